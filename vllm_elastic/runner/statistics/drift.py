# SPDX-License-Identifier: Apache-2.0
"""What comes of ``DriftTest``: similarities, and the most attended positions of each layer."""

from __future__ import annotations

import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics.flags import flags_on
from vllm_elastic.runner.statistics.saved_rows import OwnRows

_SORTED_AT_ONCE = 1 << 24
"""Positions times layers that are ranked at a time, by their attention."""


class DriftTotals:
    """Of all plans with a ``DriftTest``, filled in on every rank and added up once.

    The plans share one tensor, with canvases of the longest one's length, so that the most
    attended positions of all of them are found together.
    """

    def __init__(self, owners: dict[int, OwnRows], cache: CacheView, device: torch.device) -> None:
        self._owners, self._cache, self._device = owners, cache, device
        self._nth = {index: nth for nth, index in enumerate(owners)}
        longest = max((len(own.plan.tokens) for own in owners.values()), default=0)
        # A layer that a plan does not look at stays 0, and so does what is beyond its canvas.
        self._mass = torch.zeros(cache.num_layers, len(owners), longest, device=device)
        self._drift: dict[int, list[torch.Tensor]] = {}

    def add_mass(self, indices: list[int], layers: range, mass: torch.Tensor) -> None:
        """The attention [layers, plans, T] that some plans' windows pay each position."""
        places = [self._nth[index] for index in indices]
        self._mass[layers.start : layers.stop, places, : mass.shape[-1]] = mass

    def add_drift(self, index: int, sums: list[torch.Tensor]) -> None:
        """``ops.drift_sums`` of the layers of one plan."""
        tested = self._cache.num_tested(self._measure(index).tested_layers)
        self._drift[index] = [part[:tested] for part in sums]

    def parts(self) -> list[torch.Tensor]:
        """Views of what adds up over ranks, without what fills up the shorter canvases."""
        mass = [
            self._mass[own.plan.start_layer :, self._nth[index], : len(own.plan.tokens)]
            for index, own in self._owners.items()
        ]
        return mass + [part for sums in self._drift.values() for part in sums]

    def most_attended(self) -> dict[int, torch.Tensor]:
        """int32 [layers from the start layer on, track_num] of each plan."""
        if not self._owners:
            return {}
        measures = [self._measure(index) for index in self._owners]
        length = self._mass.shape[-1]
        trackable = flags_on(self._device, [measure.trackable for measure in measures], length)
        wanted = max(measure.track_num for measure in measures)
        # A sort takes several times the room of what it sorts.
        num_plans = max(1, _SORTED_AT_ONCE // (self._cache.num_layers * length))
        pieces = zip(self._mass.split(num_plans, dim=1), trackable.split(num_plans), strict=True)
        best = torch.cat([ops.most_attended(*piece, wanted) for piece in pieces], dim=1)
        best = best.to(torch.int32)
        return {
            index: best[own.plan.start_layer :, self._nth[index], : self._measure(index).track_num]
            for index, own in self._owners.items()
        }

    def similarities(self) -> dict[int, torch.Tensor]:
        """float32 [tested layers] of each plan that tests; overwrites the sums."""
        found = {}
        for index, sums in self._drift.items():
            measure, own = self._measure(index), self._owners[index]
            num_rows = self._cache.num_heads * ranks.count() * own.tested.size
            tested = ops.similarity_of_sums(sums, measure.statistic, num_rows)
            similarities = tested.new_full((self._cache.num_layers,), torch.nan)
            similarities[:: self._cache.hidden_stride][: len(tested)] = tested
            found[index] = similarities[: measure.tested_layers]
        return found

    def _measure(self, index: int) -> DriftTest:
        measure = self._owners[index].measure
        assert isinstance(measure, DriftTest)
        return measure
