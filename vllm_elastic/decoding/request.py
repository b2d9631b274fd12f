# SPDX-License-Identifier: Apache-2.0
"""One request's way through its denoising steps: plan a pass, take what it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import NO_POSITIONS, Canvas, Positions, merged
from vllm_elastic.decoding.grammar import Grammar
from vllm_elastic.decoding.measurement import MeasuredDrift
from vllm_elastic.decoding.plan import (
    NO_BLOCKS,
    BlockIds,
    Logprobs,
    PassKind,
    PassPlan,
    PassResult,
    Segment,
    rows_of_window,
    segments_by_join_layer,
)
from vllm_elastic.decoding.policies import make_policy
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.record import DecodingRecord, canvas_of_pass
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.decoding.schedule import LeftToRight, growth_of, make_schedule
from vllm_elastic.decoding.traits import DecodingTraits
from vllm_elastic.decoding.validity import BlockValidity


class NotFiniteError(ValueError):
    """The model's output for a request is not a number."""


class DenoisingRequest:
    """The state machine of one request.

    ``plan`` names the next pass; ``finish_pass`` takes its result and commits tokens. Where the
    policy finds the cache stale, ``refresh`` decides: ``replay`` discards the candidates, so that
    the next plan is the replay of the same step; ``next`` keeps them, and the stale rows take part
    in the next pass. Calling ``plan`` again before ``finish_pass`` returns the same plan, so a plan
    that did not fit a batch is simply asked for again.

    Args:
        end_token_ids: tokens that end the answer.
        block_size: positions of a KV block.
        block_ids: KV blocks for all that the canvas may grow to.
        adapter: the request's (LoRA), which its plans carry; None: it has none.
        stored_inputs: positions of the prompt whose input of layer 0 is no token's embedding.
        grammar: the answer has to follow it; None: any answer will do.

    Raises:
        ValueError: knobs that do not go together, or not with ``max_tokens``; names them.

    Attributes:
        refresh: ``replay`` or ``next``.
        reach: neighbours on either side of a commit that ``near_commits`` takes in.
        just_committed: positions committed in the previous step, ascending.
        appended: positions that the canvas has grown by since; no pass has computed them.
        replays: the next pass is its step's second one: the same once more, with what was found
            stale recomputed.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        max_tokens: int,
        config: ElasticConfig,
        traits: DecodingTraits,
        *,
        end_token_ids: frozenset[int],
        block_size: int,
        block_ids: BlockIds = NO_BLOCKS,
        adapter: Any = None,
        sampling: Sampling | None = None,
        stored_inputs: Positions = NO_POSITIONS,
        grammar: Grammar | None = None,
    ) -> None:
        self.request_id = request_id
        self.config = config
        self.traits = traits
        self.num_layers = traits.num_layers
        self.canvas = Canvas(
            prompt_token_ids,
            max_tokens,
            traits.mask_token_id,
            end_token_ids,
            config.canvas,
            growth_of(config, traits.grow_by),
            0 if config.steps else config.grow_ahead,
        )
        self.validity = BlockValidity(
            self.canvas.length,
            config.granularity or block_size,
            traits.num_layers,
            config.hidden_stride,
        )
        self.policy = make_policy(config)
        self.refresh = config.refresh or self.policy.refresh
        reach = self.policy.reach if config.reach is None else config.reach
        self.reach = min(reach, self.canvas.capacity)
        self.schedule = make_schedule(config, max_tokens, sampling.seed if sampling else 0)
        self.grammar = grammar
        if grammar is not None:
            self.schedule = LeftToRight(self.schedule, grammar)
        self.record = DecodingRecord(
            keep_steps=config.record,
            hand_on=config.watch,
            keep_rows=config.record_rows,
            keep_canvas=config.watch or (config.record and config.record_canvas),
        )
        self.just_committed: Positions = NO_POSITIONS
        self.appended: Positions = NO_POSITIONS
        self.sampling = sampling
        self._logprobs: dict[int, Logprobs] = {}  # by position, until the token is shown
        self._plan: PassPlan | None = None
        self.replays = False
        self._block_size = block_size
        self._block_ids = block_ids
        self._adapter = adapter
        self._stored_inputs = stored_inputs
        self._num_written = 0  # positions whose KV blocks a pass has written

    def restart(self, block_ids: BlockIds) -> None:
        """The KV blocks were taken away: keep what is committed, recompute the canvas in others."""
        self.validity.invalidate(0)
        self.just_committed = self.appended = NO_POSITIONS
        self._plan = None
        self.replays = False
        self._block_ids = block_ids
        self._num_written = 0

    def plan(self) -> PassPlan:
        """The next pass. Pure until ``finish_pass``."""
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def finish_pass(self, result: PassResult) -> list[int]:
        """Take the planned pass's result; returns tokens that joined the finished prefix.

        Raises:
            NotFiniteError: a candidate's probability is NaN.
        """
        plan = self.plan()
        self._plan = None
        self._num_written = len(plan.tokens)
        self.validity.validate()  # the pass recomputed all that was stale
        if not math.isfinite(result.probabilities.sum()):
            raise NotFiniteError(f"request {self.request_id}: {_why_not_finite(plan)}")
        found_stale = self._judge(plan, result)
        self.policy.pass_done(self, plan, result.measured)
        if found_stale and self.refresh == "replay":
            self.replays = True
            self._add_to_record(plan, result, None)
            return []
        self.replays = False
        self._commit(plan, result)
        return self.canvas.take_finished()

    def near_commits(self) -> list[slice]:
        """What the step before committed, each with its neighbours within ``reach``.

        The last range may end behind the canvas.
        """
        reach = self.reach
        return [slice(max(0, p - reach), p + reach + 1) for p in self.just_committed.tolist()]

    @property
    def refresh_end(self) -> int:
        """Exclusive bound of the positions that are refreshed: with an early exit, where the answer
        ends. What was computed of those behind it stays as it is, and is attended to."""
        return self.canvas.end if self.policy.early_exit else self.canvas.length

    def take_logprobs(self, count: int) -> list[Logprobs]:
        """Log probabilities of the last ``count`` tokens that ``finish_pass`` returned, in order.

        Tokens that an infilling request fixed itself are certain: log probability 0.
        """
        stop = self.canvas.shown
        return [
            self._logprobs.pop(position)
            if position in self._logprobs
            else _certain(self.canvas.tokens[position])
            for position in range(stop - count, stop)
        ]

    # One pass: what it computes, what it says of the cache, what it decides.

    def _make_plan(self) -> PassPlan:
        if not self.replays:
            self.policy.begin_step(self)
        window = self.schedule.window(self.canvas)
        window_rows = rows_of_window(window, self.traits.logits_shift)
        rows = self.policy.rows(self, window_rows)
        if self.appended.size:
            rows = merged(self.canvas.length, rows, self.appended)
        if not self.replays:
            self.policy.spend_spare_rows(self, rows)
        kind = self._kind_of_pass()
        # Nothing is stale in a window pass.
        segments = [Segment(0, rows)] if kind is PassKind.WINDOW else self._segments(rows)
        return PassPlan(
            request_id=self.request_id,
            kind=kind,
            denoising_step=self.record.denoising_steps,
            segments=segments,
            tokens=self.canvas.tokens.copy(),
            window=window,
            logits_shift=self.traits.logits_shift,
            measure=self.policy.measure(self, segments, window_rows, rows),
            sampling=self.sampling,
            stored_inputs=self._stored_inputs,
            allowed=None if self.grammar is None else self.grammar.allowed(),
            adapter=self._adapter,
            num_written=self._num_written,
            block_ids=self._block_ids[: -(-self.canvas.length // self._block_size)],
        )

    def _segments(self, rows: Positions) -> list[Segment]:
        """Those rows, ascending, and all that is stale."""
        join = self.validity.join_layers()
        if not self.validity.all_stale:
            join[self.refresh_end :] = self.num_layers
        # A replay repeats its step's rows too, but only from where the first block is stale.
        start = int(join.min()) if self.replays else 0
        join[rows] = np.minimum(join[rows], start)
        return segments_by_join_layer(join, self.num_layers)

    def _kind_of_pass(self) -> PassKind:
        if self.replays:
            return PassKind.REPLAY
        if self.validity.all_valid:
            return PassKind.WINDOW
        if self.validity.all_stale:
            return PassKind.FIRST if self.record.passes == 0 else PassKind.FULL
        return PassKind.REFRESH

    def _judge(self, plan: PassPlan, result: PassResult) -> bool:
        """Let the policy mark what a step's first pass found stale; whether it found anything."""
        if self.replays or result.measured is None:
            return False
        stale = self.policy.judge(self, plan, result.measured)
        if stale is not None:
            self.validity.invalidate(stale)
        return stale is not None

    def _commit(self, plan: PassPlan, result: PassResult) -> None:
        predictions = Predictions(
            plan.window, result.token_ids, result.probabilities, result.entropies
        )
        chosen = self.schedule.choose(self.canvas, predictions, plan.denoising_step)
        self.just_committed = plan.window[chosen]
        self.canvas.commit(self.just_committed, result.token_ids[chosen])
        if result.logprobs is not None:
            for index, position in zip(chosen, self.just_committed.tolist(), strict=True):
                self._logprobs[position] = result.logprobs.take(np.array([index]))
        self._add_to_record(plan, result, self.just_committed.tolist())
        self.appended = NO_POSITIONS
        if self.canvas.length > len(plan.tokens):
            self.appended = np.arange(len(plan.tokens), self.canvas.length, dtype=np.int32)
            self.validity.extend(self.canvas.length)

    def _add_to_record(
        self, plan: PassPlan, result: PassResult, committed: list[int] | None
    ) -> None:
        similarities = None
        wanted = self.config.record_similarities or self.record.keep_canvas
        if wanted and isinstance(result.measured, MeasuredDrift):
            similarities = result.measured.similarities
        canvas = None
        if self.record.keep_canvas:
            judged_by = {} if result.measured is None else self.policy.judged_by()
            canvas = canvas_of_pass(plan, result, self.canvas, self.validity, judged_by)
        self.record.add_pass(plan, self.num_layers, committed, similarities, canvas)


def _why_not_finite(plan: PassPlan) -> str:
    if plan.allowed is not None and not plan.allowed.any():
        return "its grammar lets no token of the vocabulary come next"
    if plan.allowed is not None:
        return "its grammar and other constraints leave no token, or the logits are not finite"
    return "the model's logits are not finite"


def _certain(token_id: np.int32) -> Logprobs:
    return Logprobs(
        np.array([[token_id]], dtype=np.int32),
        np.zeros((1, 1), dtype=np.float32),
        np.ones(1, dtype=np.int32),
    )
