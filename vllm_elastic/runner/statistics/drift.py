# SPDX-License-Identifier: Apache-2.0
"""What comes of ``DriftTest``: similarities, and the most attended positions of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.statistics import memory
from vllm_elastic.runner.statistics.saved_rows import OwnRows
from vllm_elastic.runner.upload import Upload

_SORTED_AT_ONCE = 1 << 24
"""Positions times layers that are ranked at a time, by their attention."""


class PendingSums(Protocol):
    """What drift tests sum up over heads, until it has been added up over ranks.

    Attributes:
        sums: contiguous or not, in place.
    """

    sums: list[torch.Tensor]

    def add_to(self, similarities: torch.Tensor) -> None:
        """Add to float32 [plans, stored layers]. The sums may be overwritten."""
        ...


@dataclass(slots=True)
class _SumsOfOne:
    """``ops.drift_sums`` [layers, ...] of some of one plan's rows.

    Attributes:
        place: of the plan; first: of the stored layers.
        share: of the rows that the plan tests.
        num_rows: attention rows that it compares, of all ranks.
    """

    place: int
    first: int
    share: float
    num_rows: int
    statistic: str
    sums: list[torch.Tensor]

    def add_to(self, similarities: torch.Tensor) -> None:
        by_layer = ops.similarity_of_sums(self.sums, self.statistic, self.num_rows)
        if self.statistic == "released":  # a mean over these rows alone
            by_layer *= self.share
        similarities[self.place, self.first : self.first + len(by_layer)] += by_layer


class DriftTotals:
    """Sums of all plans with a ``DriftTest``, filled in on every rank and added up once.

    The plans share one tensor, with canvases of the longest one's length, so that the most
    attended positions of all of them are found together.

    Attributes:
        owners: the plans, by their index; their order is that of their places.
        mass: float32 [L, plans, longest T], the attention that each position is paid.
    """

    def __init__(self, owners: dict[int, OwnRows], cache: CacheView, upload: Upload) -> None:
        self.owners, self._cache = owners, cache
        self._nth = {index: nth for nth, index in enumerate(owners)}
        longest = max((len(own.plan.tokens) for own in owners.values()), default=0)
        # A layer that a plan does not look at stays 0, and so does what is beyond its canvas.
        self.mass = torch.zeros(cache.num_layers, len(owners), longest, device=upload.device)
        measures = [self._measure(index) for index in owners]
        self._trackable = upload.put(filled_up([m.trackable for m in measures], longest, np.bool_))
        self._track_num = max((measure.track_num for measure in measures), default=0)
        self._pending: list[PendingSums] = []
        # [plans, stored layers]; most requests test nothing, and most passes.
        self._similarities: torch.Tensor | None = None
        if any(own.tested.size for own in owners.values()):
            self._similarities = self.mass.new_zeros(len(owners), cache.num_stored_layers())

    def add_mass(self, places: torch.Tensor, layers: range, mass: torch.Tensor) -> None:
        """The attention [layers, plans, T] that some plans' windows pay each position.

        Args:
            places: int64 [plans], theirs among all plans that test drift.
        """
        self.mass[layers.start : layers.stop, places, : mass.shape[-1]] = mass

    def add_drift(self, index: int, layers: range, num_rows: int, sums: list[torch.Tensor]) -> None:
        """``ops.drift_sums`` of some layers and ``num_rows`` of the tested rows of one plan."""
        own, measure = self.owners[index], self._measure(index)
        first = self._cache.num_stored_layers(layers.start)
        stop = max(0, self._cache.num_stored_layers(measure.tested_layers) - first)
        self.add_pending(
            _SumsOfOne(
                place=self._nth[index],
                first=first,
                share=num_rows / own.tested.size,
                num_rows=self._cache.num_heads * ranks.count() * own.tested.size,
                statistic=measure.statistic,
                sums=[part[:stop] for part in sums],
            )
        )

    def add_pending(self, sums: PendingSums) -> None:
        """Sums of this rank's heads; as many numbers on every rank."""
        self._pending.append(sums)
        if self.num_pending > memory.SUMS_AT_ONCE:
            ranks.add_up_in_place(self.pending())
            self.take_similarities()

    @property
    def num_pending(self) -> int:
        """Numbers that wait for ``take_similarities``."""
        return sum(part.numel() for part in self.pending())

    def pending(self) -> list[torch.Tensor]:
        """Views of the sums that have to be added up over ranks."""
        return [part for pending in self._pending for part in pending.sums]

    def take_similarities(self) -> None:
        """Turn the sums, added up over ranks, into similarities; they may be overwritten."""
        for pending in self._pending:
            assert self._similarities is not None
            pending.add_to(self._similarities)
        self._pending = []

    def parts(self) -> list[torch.Tensor]:
        """Views of what adds up over ranks, without what fills up the shorter canvases."""
        mass = [
            self.mass[own.plan.start_layer :, self._nth[index], : len(own.plan.tokens)]
            for index, own in self.owners.items()
        ]
        return mass + self.pending()

    def most_attended(self) -> dict[int, torch.Tensor]:
        """int32 [layers from the start layer on, track_num] of each plan."""
        if not self.owners:
            return {}
        # A sort takes several times the room of what it sorts.
        num_plans = max(1, _SORTED_AT_ONCE // (self._cache.num_layers * self.mass.shape[-1]))
        masses, flags = self.mass.split(num_plans, dim=1), self._trackable.split(num_plans)
        parts = zip(masses, flags, strict=True)
        best = torch.cat([ops.most_attended(*part, self._track_num) for part in parts], dim=1)
        best = best.movedim(1, 0).to(torch.int32)
        return {
            index: best[self._nth[index], own.plan.start_layer :, : self._measure(index).track_num]
            for index, own in self.owners.items()
        }

    def similarities(self) -> dict[int, torch.Tensor]:
        """float32 [tested layers] of each plan that tests."""
        if self._similarities is None:
            return {}
        stride, num_layers = self._cache.hidden_stride, self._cache.num_layers
        found = self._similarities.new_full((len(self.owners), num_layers), torch.nan)
        found[:, ::stride] = self._similarities
        return {
            index: found[self._nth[index], : self._measure(index).tested_layers]
            for index, own in self.owners.items()
            if own.tested.size
        }

    def _measure(self, index: int) -> DriftTest:
        measure = self.owners[index].measure
        assert isinstance(measure, DriftTest)
        return measure
