# SPDX-License-Identifier: Apache-2.0
"""What comes of ``DriftTest``: similarities, and the most attended positions of each layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.statistics.saved_rows import OwnRows
from vllm_elastic.runner.upload import Upload

_SORTED_AT_ONCE = 1 << 24
"""Positions times layers that are ranked at a time, by their attention."""


@dataclass(slots=True)
class _Sums:
    """``ops.drift_sums`` [layers, ...] of one plan, of stored layers from ``first`` on."""

    index: int
    first: int
    num_rows: int
    sums: list[torch.Tensor]


class DriftTotals:
    """Of all plans with a ``DriftTest``, filled in on every rank and added up once.

    The plans share one tensor, with canvases of the longest one's length, so that the most
    attended positions of all of them are found together.
    """

    def __init__(self, owners: dict[int, OwnRows], cache: CacheView, upload: Upload) -> None:
        self._owners, self._cache = owners, cache
        self._nth = {index: nth for nth, index in enumerate(owners)}
        longest = max((len(own.plan.tokens) for own in owners.values()), default=0)
        # A layer that a plan does not look at stays 0, and so does what is beyond its canvas.
        self._mass = torch.zeros(cache.num_layers, len(owners), longest, device=upload.device)
        measures = [self._measure(index) for index in owners]
        self._trackable = upload.put(filled_up([m.trackable for m in measures], longest, np.bool_))
        self._track_num = max((measure.track_num for measure in measures), default=0)
        self._pending: list[_Sums] = []
        self._similarities: dict[int, torch.Tensor] = {}

    def add_mass(self, places: torch.Tensor, layers: range, mass: torch.Tensor) -> None:
        """The attention [layers, plans, T] that some plans' windows pay each position.

        Args:
            places: int64 [plans], theirs among all plans that test drift.
        """
        self._mass[layers.start : layers.stop, places, : mass.shape[-1]] = mass

    def add_drift(self, index: int, layers: range, num_rows: int, sums: list[torch.Tensor]) -> None:
        """``ops.drift_sums`` of some layers and ``num_rows`` of the tested rows of one plan."""
        first = -(-layers.start // self._cache.hidden_stride)
        tested = self._cache.num_tested(self._measure(index).tested_layers)
        stop = None if tested is None else max(0, tested - first)
        self._pending.append(_Sums(index, first, num_rows, [part[:stop] for part in sums]))

    @property
    def num_pending(self) -> int:
        """Numbers that wait for ``take_similarities``."""
        return sum(part.numel() for part in self.pending())

    def pending(self) -> list[torch.Tensor]:
        """Views of the sums that have to be added up over ranks."""
        return [part for each in self._pending for part in each.sums]

    def take_similarities(self) -> None:
        """Turn the sums, added up over ranks, into similarities; they are overwritten."""
        for each in self._pending:
            own, statistic = self._owners[each.index], self._measure(each.index).statistic
            num_attention_rows = self._cache.num_heads * ranks.count() * own.tested.size
            found = ops.similarity_of_sums(each.sums, statistic, num_attention_rows)
            if statistic == "released":  # a mean over these rows alone
                found *= each.num_rows / own.tested.size
            kept = self._similarities.setdefault(
                each.index, found.new_zeros(self._cache.num_layers)
            )
            kept[each.first : each.first + len(found)] += found
        self._pending = []

    def parts(self) -> list[torch.Tensor]:
        """Views of what adds up over ranks, without what fills up the shorter canvases."""
        mass = [
            self._mass[own.plan.start_layer :, self._nth[index], : len(own.plan.tokens)]
            for index, own in self._owners.items()
        ]
        return mass + self.pending()

    def most_attended(self) -> dict[int, torch.Tensor]:
        """int32 [layers from the start layer on, track_num] of each plan."""
        if not self._owners:
            return {}
        # A sort takes several times the room of what it sorts.
        num_plans = max(1, _SORTED_AT_ONCE // (self._cache.num_layers * self._mass.shape[-1]))
        masses, flags = self._mass.split(num_plans, dim=1), self._trackable.split(num_plans)
        pieces = zip(masses, flags, strict=True)
        best = torch.cat([ops.most_attended(*piece, self._track_num) for piece in pieces], dim=1)
        best = best.to(torch.int32)
        return {
            index: best[own.plan.start_layer :, self._nth[index], : self._measure(index).track_num]
            for index, own in self._owners.items()
        }

    def similarities(self) -> dict[int, torch.Tensor]:
        """float32 [tested layers] of each plan that tests."""
        found = {}
        for index, stored in self._similarities.items():
            tested_layers = self._measure(index).tested_layers
            similarities = torch.full_like(stored, torch.nan)
            places = similarities[:: self._cache.hidden_stride]
            places.copy_(stored[: len(places)])
            found[index] = similarities[:tested_layers]
        return found

    def _measure(self, index: int) -> DriftTest:
        measure = self._owners[index].measure
        assert isinstance(measure, DriftTest)
        return measure
