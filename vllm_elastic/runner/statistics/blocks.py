# SPDX-License-Identifier: Apache-2.0
"""What comes of ``BlockProbe``: attention by blocks, and how far probes have drifted."""

from __future__ import annotations

import numpy as np
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import BlockProbe
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.statistics.saved_rows import OwnRows
from vllm_elastic.runner.upload import Upload


class BlockTotals:
    """Of all plans with a ``BlockProbe``, filled in on every rank and added up once.

    The plans share one tensor, with canvases of the longest one's length, so that the blocks of
    all of them are found together.

    Attributes:
        owners: the plans, by their index; their order is that of their places.
        mass: float32 [plans, longest T], the attention that each position is paid.
    """

    def __init__(self, owners: dict[int, OwnRows], cache: CacheView, upload: Upload) -> None:
        self.owners, self._cache = owners, cache
        self._nth = {index: nth for nth, index in enumerate(owners)}
        longest = max((len(own.plan.tokens) for own in owners.values()), default=0)
        self.mass = torch.zeros(len(owners), longest, device=upload.device)
        watched = [self._measure(index).watched for index in owners]
        self._watched = upload.put(filled_up(watched, longest, np.bool_))
        # Plans whose blocks have as many positions are worked out together.
        self._alike: list[tuple[int, list[int], torch.Tensor]] = []
        for size in sorted({self._measure(index).block_size for index in owners}):
            alike = [index for index in owners if self._measure(index).block_size == size]
            places = upload.put(np.array([self._nth[index] for index in alike]))
            self._alike.append((size, alike, places))
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
        self._probes = [change, before]

    def parts(self) -> list[torch.Tensor]:
        """Views of what adds up over ranks, without what fills up the shorter canvases."""
        mass = [
            self.mass[self._nth[index], : len(own.plan.tokens)]
            for index, own in self.owners.items()
        ]
        return mass + self._probes

    def blocks(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """float32 [blocks] mass and int32 [blocks] most attended position of each plan."""
        if not self.owners:
            return {}
        # The norm is the whole canvas's attention, whether it is watched or not.
        share = self.mass / self.mass.sum(dim=-1, keepdim=True)
        found = {}
        for block_size, alike, places in self._alike:
            mass, best = ops.attended_blocks(share[places], self._watched[places], block_size)
            best = best.to(torch.int32)
            for nth, index in enumerate(alike):
                own = slice(-(-len(self.owners[index].plan.tokens) // block_size))
                found[index] = mass[nth, own], best[nth, own]
        return found

    def probe_drift(self) -> dict[int, torch.Tensor]:
        """float32 [probes, L] of each plan that probes."""
        if not self._probes:
            return {}
        change, before = self._probes
        stride = self._cache.hidden_stride
        drift = change.new_zeros(change.shape[1], self._cache.num_layers)
        drift[:, stride::stride] = (change.sqrt() / before.sqrt().clamp_min(ops.NORM_FLOOR)).T
        probing = [index for index in self.owners if self._measure(index).probes.size]
        counts = [self._measure(index).probes.size for index in probing]
        return dict(zip(probing, drift.split(counts), strict=True))

    def _measure(self, index: int) -> BlockProbe:
        measure = self.owners[index].measure
        assert isinstance(measure, BlockProbe)
        return measure
