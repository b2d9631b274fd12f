# SPDX-License-Identifier: Apache-2.0
"""What attention statistics add up from over heads and ranks, and what comes of the totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
from vllm_elastic.runner.attention_shape import AttentionShape

Measured = dict[str, npt.NDArray[Any]]
"""A plan's statistics by their names in ``PassResult``."""

_SORTED_AT_ONCE = 1 << 24
"""Positions times layers that are ranked at a time, by their attention."""


class StatisticSums:
    """The statistics of all plans of a pass, filled in on every rank and added up once.

    Plans share tensors, with canvases of the longest one's length, so that the most attended
    positions and blocks of all of them are found together.
    """

    def __init__(
        self, plans: Sequence[PassPlan], shape: AttentionShape, device: torch.device
    ) -> None:
        self._plans, self._shape, self._device = plans, shape, device
        tracking = [i for i, plan in enumerate(plans) if plan.trackable is not None]
        judged = [i for i, plan in enumerate(plans) if plan.granularity]
        self._tracking = {index: nth for nth, index in enumerate(tracking)}
        self._judged = {index: nth for nth, index in enumerate(judged)}
        self._layers: dict[int, range] = {}
        # A layer that a plan does not look at stays 0, and so does what is beyond its canvas.
        self._mass = torch.zeros(
            shape.num_layers, len(tracking), self._longest(tracking), device=device
        )
        self._share = torch.zeros(len(judged), self._longest(judged), device=device)
        self._probes: list[torch.Tensor] = []
        self._drift: dict[int, list[torch.Tensor]] = {}

    def add_mass(self, indices: Sequence[int], layers: range, mass: torch.Tensor) -> None:
        """The attention [layers, plans, T] that the windows of some plans pay each position.

        T is that of the longest of these plans; the others' mass beyond their own is 0.
        """
        tracking = [nth for nth, index in enumerate(indices) if index in self._tracking]
        judged = [nth for nth, index in enumerate(indices) if index in self._judged]
        if tracking:
            places = [self._tracking[indices[nth]] for nth in tracking]
            length = min(mass.shape[-1], self._mass.shape[-1])
            self._mass[_span(layers), places, :length] = mass[:, tracking, :length]
            self._layers |= {indices[nth]: layers for nth in tracking}
        if judged:
            # Summed over layers already: a layer's own mass would be L times as much to send.
            places = [self._judged[indices[nth]] for nth in judged]
            length = min(mass.shape[-1], self._share.shape[-1])
            self._share[places, :length] = mass[:, judged, :length].sum(dim=0)

    def add_probes(self, change: torch.Tensor, before: torch.Tensor) -> None:
        """Squared norms [stored, probes of all plans], plan by plan, of the stored inputs."""
        self._probes = [change, before]

    def add_drift(self, index: int, sums: list[torch.Tensor]) -> None:
        """``ops.drift_sums`` of a plan's tested layers."""
        self._drift[index] = sums[:]

    def add_up(self) -> None:
        """Over all ranks, by one all-reduce; every rank has worked on the same plans."""
        if ranks.count() == 1:
            return
        # Without what fills up the shorter canvases: it would be sent for nothing.
        parts = [
            self._mass[_span(layers), self._tracking[index], : len(self._plans[index].tokens)]
            for index, layers in self._layers.items()
        ]
        parts += [
            self._share[nth, : len(self._plans[index].tokens)]
            for index, nth in self._judged.items()
        ]
        parts += self._probes
        parts += [part for sums in self._drift.values() for part in sums]
        for part, total in zip(parts, ranks.add_up(parts), strict=True):
            part.copy_(total)

    def measure(self) -> list[Measured]:
        """Each plan's statistics, from the totals, which are overwritten."""
        on_device = self._most_attended() + self._attended_blocks()
        on_device += self._probe_drift() + self._similarities()
        measured: list[Measured] = [{} for _ in self._plans]
        for (index, name, _), array in zip(on_device, _to_host(on_device), strict=True):
            measured[index][name] = array
        return measured

    def _most_attended(self) -> list[_Part]:
        if not self._tracking:
            return []
        trackable = self._flags(
            {nth: self._plans[index].trackable for index, nth in self._tracking.items()},
            self._mass.shape[-1],
        )
        wanted = max(self._plans[index].track_num for index in self._tracking)
        # A sort takes several times the room of what it sorts.
        num_plans = max(1, _SORTED_AT_ONCE // (self._shape.num_layers * self._mass.shape[-1]))
        pieces = zip(self._mass.split(num_plans, dim=1), trackable.split(num_plans), strict=True)
        tracked = torch.cat([ops.most_attended(*piece, wanted) for piece in pieces], dim=1)
        tracked = tracked.to(torch.int32)
        parts = []
        for index, nth in self._tracking.items():
            layers, count = self._layers[index], self._plans[index].track_num
            own = tracked[_span(layers), nth, :count]
            parts.append((index, "most_attended", own))
        return parts

    def _attended_blocks(self) -> list[_Part]:
        if not self._judged:
            return []
        watched = self._flags(
            {nth: self._plans[index].watched for index, nth in self._judged.items()},
            self._share.shape[-1],
        )
        # The norm is the whole canvas's attention, whether it is watched or not.
        share = self._share / self._share.sum(dim=-1, keepdim=True)
        parts: list[_Part] = []
        for granularity in {self._plans[index].granularity for index in self._judged}:
            alike = [i for i in self._judged if self._plans[i].granularity == granularity]
            rows = [self._judged[index] for index in alike]
            mass, probes = ops.attended_blocks(share[rows], watched[rows], granularity)
            probes = probes.to(torch.int32)
            for nth, index in enumerate(alike):
                blocks = slice(-(-len(self._plans[index].tokens) // granularity))
                parts.append((index, "block_mass", mass[nth, blocks]))
                parts.append((index, "block_probes", probes[nth, blocks]))
        return parts

    def _probe_drift(self) -> list[_Part]:
        if not self._probes:
            return []
        change, before = self._probes
        stride = self._shape.hidden_stride
        drift = change.new_zeros(change.shape[1], self._shape.num_layers)
        drift[:, stride::stride] = (change.sqrt() / before.sqrt().clamp_min(ops.NORM_FLOOR)).T
        probing = [index for index, plan in enumerate(self._plans) if plan.probes.size]
        own = drift.split([self._plans[index].probes.size for index in probing])
        return [(index, "probe_drift", part) for index, part in zip(probing, own, strict=True)]

    def _similarities(self) -> list[_Part]:
        parts = []
        for index, sums in self._drift.items():
            plan = self._plans[index]
            num_rows = self._shape.num_heads * ranks.count() * plan.tested.size
            tested = ops.similarity_of_sums(sums, plan.statistic, num_rows)
            similarities = tested.new_full((self._shape.num_layers,), torch.nan)
            similarities[:: self._shape.hidden_stride][: len(tested)] = tested
            parts.append((index, "similarities", similarities[: plan.tested_layers]))
        return parts

    def _longest(self, indices: list[int]) -> int:
        return max((len(self._plans[index].tokens) for index in indices), default=0)

    def _flags(self, rows: dict[int, npt.NDArray[np.bool_] | None], length: int) -> torch.Tensor:
        """bool [plans, length] on the device: rows of their own lengths, filled up with False."""
        flags = np.zeros((len(rows), length), dtype=np.bool_)
        for nth, row in rows.items():
            assert row is not None
            flags[nth, : len(row)] = row
        return torch.from_numpy(flags).to(self._device)


def _span(layers: range) -> slice:
    return slice(layers.start, layers.stop, layers.step)


_Part = tuple[int, str, torch.Tensor]
"""Plan, name of a statistic, and its int32 or float32 numbers on the device."""


def _to_host(parts: list[_Part]) -> list[npt.NDArray[Any]]:
    """All numbers, of 4 bytes each, in one transfer: a GPU is waited for at every one."""
    tensors = [tensor for _, _, tensor in parts]
    if not tensors:
        return []
    if tensors[0].is_cpu:
        return [tensor.numpy() for tensor in tensors]
    words = torch.cat([tensor.flatten().view(torch.int32) for tensor in tensors]).cpu()
    pieces = words.split([tensor.numel() for tensor in tensors])
    return [
        piece.view(tensor.dtype).view(tensor.shape).numpy()
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]
