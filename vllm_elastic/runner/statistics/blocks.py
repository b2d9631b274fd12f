# SPDX-License-Identifier: Apache-2.0
"""What comes of ``BlockProbe``: the attention paid to positions, and how far probes drifted."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.attention.attention_statistics import NORM_FLOOR
from vllm_elastic.decoding.measurement import BlockProbe, Measured, MeasuredProbes
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.download import Download, Fetched
from vllm_elastic.runner.statistics.saved_rows import OwnRows

Floats = npt.NDArray[np.float32]


class BlockTotals:
    """Sums of all plans with a ``BlockProbe``, filled in on every rank and added up once.

    The plans share one tensor, with canvases of the longest one's length. What their shares and
    blocks are is worked out on the host, each plan by itself: a handful of numbers that would take
    twenty operators, and whose rounding must not depend on how long another canvas is.

    Attributes:
        owners: the plans, by their index; their order is that of their places.
        mass: float32 [plans, longest T], the attention that each position is paid.
    """

    def __init__(self, owners: dict[int, OwnRows], cache: CacheView, device: torch.device) -> None:
        self.owners, self._cache = owners, cache
        self._nth = {index: nth for nth, index in enumerate(owners)}
        longest = max((len(own.plan.tokens) for own in owners.values()), default=0)
        self.mass = torch.zeros(len(owners), longest, device=device)
        self._probes: list[torch.Tensor] = []

    def add_mass(self, places: torch.Tensor, mass: torch.Tensor) -> None:
        """The attention [layers, plans, T] that some plans' windows pay each position.

        Args:
            places: int64 [plans], theirs among all plans that probe blocks.
        """
        # Summed over layers already: a layer's own mass would be L times as much to send.
        self.mass[places, : mass.shape[-1]] = mass.sum(dim=0)

    def add_probes(self, change: torch.Tensor, before: torch.Tensor) -> None:
        """Squared norms [stored, probes of all plans], plan by plan, of the stored inputs."""
        # Probe by probe, so that a plan's are neighbours: a transfer copies nothing together.
        self._probes = [part.T.contiguous() for part in (change, before)]

    def parts(self) -> list[torch.Tensor]:
        """Views of what adds up over ranks, without what fills up the shorter canvases."""
        return list(self._masses().values()) + self._probes

    def results(self, download: Download) -> dict[int, Fetched[Measured]]:
        """What each plan asked for, once the download has arrived."""
        changes: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        if self._probes:
            probing = [index for index in self.owners if self._num_probes(index)]
            counts = [self._num_probes(index) for index in probing]
            by_plan = zip(*(norms.split(counts) for norms in self._probes), strict=True)
            changes = dict(zip(probing, by_plan, strict=True))
        return {
            index: download.of(self._measured, mass, *changes.get(index, (None, None)))
            for index, mass in self._masses().items()
        }

    def _masses(self) -> dict[int, torch.Tensor]:
        """Views [T] of the total, of each plan."""
        return {
            index: self.mass[self._nth[index], : len(own.plan.tokens)]
            for index, own in self.owners.items()
        }

    def _measured(
        self, mass: Floats, change: Floats | None, before: Floats | None
    ) -> MeasuredProbes:
        """One plan's, on the host, of its mass [T] and squared norms [probes, stored]."""
        attention = mass / mass.sum()  # the whole canvas's, whether it is watched or not
        if change is None or before is None:
            return MeasuredProbes(attention)
        drift = np.zeros((len(change), self._cache.num_layers), dtype=np.float32)
        stride = self._cache.hidden_stride
        drift[:, stride::stride] = np.sqrt(change) / np.maximum(np.sqrt(before), NORM_FLOOR)
        return MeasuredProbes(attention, drift)

    def _num_probes(self, index: int) -> int:
        measure = self.owners[index].measure
        assert isinstance(measure, BlockProbe)
        return len(measure.probes)
