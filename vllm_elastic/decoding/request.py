# SPDX-License-Identifier: Apache-2.0
"""One request's way through its denoising steps: plan a pass, digest what it reports."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import Canvas, Positions, merged
from vllm_elastic.decoding.plan import (
    NO_POSITIONS,
    Logprobs,
    PassPlan,
    PassResult,
    join_candidates,
    segments_by_join_layer,
)
from vllm_elastic.decoding.policies import make_policy
from vllm_elastic.decoding.record import DecodingRecord
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.decoding.schedule import make_schedule
from vllm_elastic.decoding.validity import BlockValidity


class NotFiniteError(ValueError):
    """The model's output for a request is not a number."""


class DenoisingRequest:
    """The state machine of one request.

    ``plan`` names the next pass; ``digest`` takes its result and commits tokens. Where the policy
    finds the cache stale, ``refresh`` decides: ``replay`` discards the candidates, so that the
    next plan is the replay of the same step; ``next`` keeps them, and the stale rows take part
    in the next pass. Where the policy predicts a part of the window first and too few of these
    predictions reach the threshold, a *widened* pass predicts the rest, and the step chooses from
    all. Calling ``plan`` again before ``digest`` returns the same plan, so a
    plan that did not fit a batch is simply asked for again.

    Attributes:
        refresh: ``replay`` or ``next``.
        reach: neighbours on either side of a commit that ``near_commits`` takes in.
        tracked: positions whose attention the drift test watches, ascending.
        just_committed: positions committed in the previous step, ascending.
        last_probability: float64 [T], of each position's last prediction that a step chose from;
            NaN: none yet.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        config: ElasticConfig,
        *,
        mask_token_id: int,
        end_token_ids: frozenset[int],
        num_layers: int,
        block_size: int,
        sampling: Sampling | None = None,
    ) -> None:
        self.request_id = request_id
        self.config = config
        self.num_layers = num_layers
        self.canvas = Canvas(
            prompt_token_ids, max_tokens, mask_token_id, end_token_ids, config.canvas
        )
        granularity = config.granularity or block_size
        self.validity = BlockValidity(
            self.canvas.length, granularity, num_layers, config.hidden_stride
        )
        self.policy = make_policy(config)
        self.refresh = config.refresh or self.policy.refresh
        reach = self.policy.reach if config.reach is None else config.reach
        self.reach = min(reach, self.canvas.length)
        self.schedule = make_schedule(config, max_tokens, sampling.seed if sampling else 0)
        self.record = DecodingRecord(keep_steps=config.record, keep_rows=config.record_rows)
        self.tracked: Positions = NO_POSITIONS
        self.just_committed: Positions = NO_POSITIONS
        self.last_probability = np.full(self.canvas.length, np.nan)
        self.sampling = sampling
        self._logprobs: dict[int, Logprobs] = {}  # by position, until the token is shown
        self._plan: PassPlan | None = None
        self._verified: PassResult | None = None  # the window pass that the replay repeats
        self._first_part: tuple[Positions, PassResult] | None = None  # its rest is next
        self._fresh = True  # no pass has written the KV blocks yet
        self._whole_window = 0  # masks that the planned step may predict

    def restart(self) -> None:
        """The KV blocks were taken away: keep what is committed, recompute the canvas."""
        self.validity.invalidate(0)
        self.tracked = NO_POSITIONS
        self.just_committed = NO_POSITIONS
        self.last_probability[:] = np.nan
        self._plan = None
        self._verified = None
        self._first_part = None
        self._fresh = True

    def plan(self) -> PassPlan:
        """The next pass. Pure until ``digest``."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def digest(self, result: PassResult) -> list[int]:
        """Take the planned pass's result; returns tokens that joined the finished prefix.

        Raises:
            NotFiniteError: a candidate's probability is NaN.
        """
        plan = self.plan()
        self._plan = None
        self._fresh = False
        self.validity.validate()  # the pass recomputed all that was stale
        if not np.isfinite(result.probabilities).all():
            raise NotFiniteError(f"request {self.request_id}: the model's logits are not finite")
        if self._verified is None:
            stale_from = self.policy.judge(self, plan, result)
            if stale_from is not None:
                self.validity.invalidate(stale_from)
                if self.refresh == "replay":
                    self._verified = result
                    self._add_to_record(plan, result, None)
                    return []
        if self._first_part is None and not self._is_sure(plan, result):
            self._verified = None
            self._first_part = plan.window, result
            self._add_to_record(plan, result, None)
            return []
        self._update_tracked(plan, result)
        self._verified = None
        window, found = plan.window, result
        if self._first_part is not None:
            window, found = join_candidates(*self._first_part, window, found)
            self._first_part = None
        self.last_probability[window] = found.probabilities
        chosen = self.schedule.choose(self.canvas, window, found.probabilities, plan.denoising_step)
        self.just_committed = window[chosen]
        self.canvas.commit(self.just_committed, found.token_ids[chosen])
        if found.logprobs is not None:
            for index, position in zip(chosen, self.just_committed.tolist(), strict=True):
                self._logprobs[position] = found.logprobs.take(np.array([index]))
        self._add_to_record(plan, result, self.just_committed.tolist())
        return self.canvas.take_finished()

    def near_commits(self) -> Positions:
        """What the step before committed and its neighbours within ``reach``, ascending."""
        if not self.reach:
            return self.just_committed
        # What would lie outside is moved to the canvas's end, which is nearer.
        around = self.just_committed[:, None] + np.arange(-self.reach, self.reach + 1)
        return merged(self.canvas.length, around.clip(0, self.canvas.length - 1))

    def take_logprobs(self, count: int) -> list[Logprobs]:
        """Log probabilities of the last ``count`` tokens that ``digest`` returned, in order.

        Tokens that an infilling request fixed itself are certain: log probability 0.
        """
        stop = self.canvas.shown
        return [
            self._logprobs.pop(position)
            if position in self._logprobs
            else _certain(self.canvas.tokens[position])
            for position in range(stop - count, stop)
        ]

    def _make_plan(self) -> PassPlan:
        replay, widened = self._verified is not None, self._first_part is not None
        if not replay and not widened:
            self.policy.begin_step(self)
        window = self.schedule.window(self.canvas)
        self._whole_window = len(window)
        if self._first_part is not None:
            window = np.setdiff1d(window, self._first_part[0])
        else:
            window = self.policy.predicted(self, window)
        join = self.validity.join_layers()
        everything, current = bool((join == 0).all()), self.validity.all_valid
        # In a replay the window pass's rows go again too, from where the first block is stale.
        rows = window if widened else self.policy.rows(self, window)
        join[rows] = np.minimum(join[rows], int(join.min()) if replay else 0)
        if replay:
            kind = "replay"
        elif widened:
            kind = "widened"
        elif everything:
            kind = "first" if self.record.passes == 0 else "full"
        else:
            kind = "window" if current else "refresh"
        measures = self.policy.measures
        watched = None
        again = replay or widened  # the step's first pass has measured
        judged = self.policy.probes_blocks and not again
        if judged:
            watched = np.ones(self.canvas.length, dtype=np.bool_)
            watched[window if (join == 0).all() else rows] = False
        compared = not everything and not again
        return PassPlan(
            request_id=self.request_id,
            kind=kind,
            denoising_step=self.record.denoising_steps,
            segments=segments_by_join_layer(join, self.num_layers),
            tokens=self.canvas.tokens.copy(),
            window=window,
            tested=self.tracked if measures and compared else NO_POSITIONS,
            tested_layers=None if current else int(self.validity.stale_from.min()),
            trackable=~self.canvas.masked if measures else None,
            track_num=self.config.track_num,
            statistic=self.config.statistic,
            sampling=self.sampling,
            probes=self.policy.probes(self) if compared and join.any() else NO_POSITIONS,
            granularity=self.validity.block_size if judged else 0,
            attention_stride=self.config.attention_stride if judged else 1,
            watched=watched,
            fresh=self._fresh,
        )

    def _is_sure(self, plan: PassPlan, result: PassResult) -> bool:
        """Whether the step may choose from these predictions: a whole window's, or enough of
        them that reach the threshold. A best guess is the best of the whole window."""
        if len(plan.window) == self._whole_window:
            return True
        needed = min(self.config.tokens_per_step or 1, self._whole_window)
        return int(np.count_nonzero(result.probabilities >= self.config.threshold)) >= needed

    def _add_to_record(
        self, plan: PassPlan, result: PassResult, committed: list[int] | None
    ) -> None:
        similarities = result.similarities if self.config.record_similarities else None
        self.record.add_pass(plan, self.num_layers, committed, similarities)

    def _update_tracked(self, plan: PassPlan, result: PassResult) -> None:
        """Union over layers of the most attended; a replay measured the layers it recomputed."""
        if result.most_attended is None:
            return
        measured: list[npt.NDArray[np.int32]] = [result.most_attended.ravel()]
        if self._verified is not None and self._verified.most_attended is not None:
            measured.append(self._verified.most_attended[: plan.start_layer].ravel())
        union = np.unique(np.concatenate(measured))
        self.tracked = union[union >= 0].astype(np.int32)


def _certain(token_id: np.int32) -> Logprobs:
    return Logprobs(
        np.array([[token_id]], dtype=np.int32),
        np.zeros((1, 1), dtype=np.float32),
        np.ones(1, dtype=np.int32),
    )
