# SPDX-License-Identifier: Apache-2.0
"""From the window rows' hidden states to candidates, so many logits at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.decoding.traits import DecodingTraits
from vllm_elastic.models import ranks
from vllm_elastic.models.rows import RowAdapters
from vllm_elastic.runner.allowed_tokens import AllowedTokens
from vllm_elastic.runner.candidates import (
    as_dream,
    entropies_of,
    leave_out_of_confidence,
    logprobs_of,
    most_probable,
    sampled,
)
from vllm_elastic.runner.constraints import Constraints
from vllm_elastic.runner.draws import Draws, is_drawn
from vllm_elastic.runner.ragged import bounds, joined
from vllm_elastic.runner.statistics.memory import LOGITS_AT_ONCE
from vllm_elastic.runner.upload import Upload


def rows_at_once(vocab_size: int) -> int:
    """Window rows whose logits exist together."""
    return max(1, LOGITS_AT_ONCE // vocab_size)


@dataclass(slots=True)
class Candidates:
    """What is predicted for all window rows of a pass, plan by plan.

    Attributes:
        token_ids: int32 [W]; probabilities: float64 [W]; both on the device.
        entropies: float64 [W] on the device, 0 where not asked for; None: nobody asked.
        logprobs: of the plans that asked, by their index: what ``plan.Logprobs`` is made of, on
            the device or, where it is much, on the host.
    """

    token_ids: torch.Tensor
    probabilities: torch.Tensor
    entropies: torch.Tensor | None
    logprobs: dict[int, tuple[torch.Tensor, ...]]


class Head:
    """Chooses the candidates of one pass."""

    def __init__(self, plans: Sequence[PassPlan], traits: DecodingTraits, upload: Upload) -> None:
        self._plans, self._traits = plans, traits
        ends = bounds(len(plan.window) for plan in plans)
        self.slices = list(map(slice, ends, ends[1:]))
        self._allowed = AllowedTokens(plans, self.slices, traits.vocab_size, upload)
        self._never_chosen = upload.put(np.array(traits.never_chosen, dtype=np.int64))
        self._constraints = {
            index: Constraints(plan.sampling, traits.vocab_size, upload)
            for index, plan in enumerate(plans)
            if plan.sampling is not None
        }
        if self._constraints:  # nobody else asks where a row is
            positions = np.concatenate([plan.window for plan in plans], dtype=np.int64)
            self._positions = upload.put(positions)
        self._draws = None  # elsewhere, and in this pass, nothing is drawn by a kernel
        if upload.device.type == "cuda" and any(
            plan.sampling is not None and is_drawn(plan.sampling) for plan in plans
        ):
            self._draws = Draws(plans, self.slices, upload)

    def predict(
        self, model: Any, hidden: torch.Tensor, adapters: RowAdapters | None = None
    ) -> Candidates | None:
        """Candidates of the W window rows; None on ranks that do not report.

        All ranks take part: each has a part of the vocabulary.

        Args:
            hidden: [W filled up, d], final. What fills up goes through the head too, so that its
                product has few shapes, and no further.
            adapters: of these rows; None: they have none.
        """
        num_rows = self.slices[-1].stop
        token_ids, probabilities = [], []
        logprobs: dict[int, list[tuple[torch.Tensor, ...]]] = defaultdict(list)
        entropies = None
        if any(plan.sampling is not None and plan.sampling.entropies for plan in self._plans):
            entropies = torch.zeros(num_rows, dtype=torch.float64, device=hidden.device)
        count = rows_at_once(self._traits.vocab_size)
        for start in range(0, num_rows, count):
            rows = slice(start, min(start + count, num_rows))
            chunk = hidden[start : start + count]
            if adapters is not None:
                adapters.use(start, start + len(chunk))
            logits = model.compute_logits(chunk)
            if not ranks.reports():
                continue
            logits = logits[: rows.stop - rows.start]
            ids, confidence = self._choose(logits, rows, entropies, logprobs)
            token_ids.append(ids)
            probabilities.append(confidence)
        if not ranks.reports():
            return None
        return Candidates(
            joined(token_ids).to(torch.int32),
            joined(probabilities),
            entropies,
            {
                index: tuple(map(joined, zip(*parts, strict=True)))
                for index, parts in logprobs.items()
            },
        )

    def _choose(
        self,
        logits: torch.Tensor,
        rows: slice,
        entropies: torch.Tensor | None,
        logprobs: dict[int, list[tuple[torch.Tensor, ...]]],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and probabilities of some of the window rows, from their logits.

        Args:
            entropies: float64, of all window rows: filled in where asked for.
            logprobs: added to where asked for; they are of what the model says, not of what a
                request's constraints leave of it.
        """
        logits.index_fill_(-1, self._never_chosen, -torch.inf)
        raw = {}
        for index, here, overall in self._wishes(rows):
            sampling = self._plans[index].sampling
            assert sampling is not None
            if sampling.num_logprobs is not None:
                raw[index] = logits[here].clone()
            self._constraints[index].apply(logits[here], self._positions[overall])
        self._allowed.apply(logits, rows)
        token_ids, confidence = most_probable(logits)
        if self._draws is not None:
            # Triton need not be there elsewhere.
            from vllm_elastic.runner.sampling_kernel import sample_by_kernel

            sample_by_kernel(logits, self._draws, rows, token_ids, confidence)
        for index, here, overall in self._wishes(rows):
            plan, sampling = self._plans[index], self._plans[index].sampling
            assert sampling is not None
            if self._draws is None and is_drawn(sampling):
                choose = sampled if sampling.alg is None else as_dream
                token_ids[here], confidence[here] = choose(
                    logits[here], sampling, plan.denoising_step, self._positions[overall]
                )
            if sampling.entropies:
                assert entropies is not None
                entropies[overall] = entropies_of(logits[here])
            unconfident = self._constraints[index].unconfident
            if unconfident is not None:
                leave_out_of_confidence(
                    confidence[here], token_ids[here], logits[here], unconfident
                )
            if index in raw:
                assert sampling.num_logprobs is not None
                logprobs[index].append(
                    logprobs_of(raw[index], token_ids[here], sampling.num_logprobs)
                )
        return token_ids, confidence

    def _wishes(self, rows: slice) -> Iterator[tuple[int, slice, slice]]:
        """Plans that want more than the most probable token, of which some rows are here.

        Yields:
            the plan's index, its rows among ``rows``, the same among all window rows.
        """
        for index, window in enumerate(self.slices):
            first, last = max(window.start, rows.start), min(window.stop, rows.stop)
            if self._plans[index].sampling is not None and first < last:
                here = slice(first - rows.start, last - rows.start)
                yield index, here, slice(first, last)
