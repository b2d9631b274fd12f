# SPDX-License-Identifier: Apache-2.0
"""What a pass has to compute and to move, however it is done: counted from its plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.decoding.plan import PassPlan


@dataclass(frozen=True)
class Rates:
    """What a device reaches in one long piece of work.

    Attributes:
        flops: operations a second of a large matrix product in the model's number format.
        bandwidth: bytes a second of a large copy, what it reads and what it writes.
    """

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Floor:
    """The least that a pass takes, in seconds: all of its bytes, all of its operations."""

    transfer: float
    compute: float

    @classmethod
    def of(cls, shape: ModelShape, plans: Sequence[PassPlan], rates: Rates) -> Floor:
        work = sum(operations(shape, plan) for plan in plans)
        return cls(bytes_moved(shape, plans) / rates.bandwidth, work / rates.flops)

    @property
    def seconds(self) -> float:
        """The longer of the two: at best they overlap."""
        return max(self.transfer, self.compute)


def operations(shape: ModelShape, plan: PassPlan) -> int:
    """Floating-point operations of a plan's matrix products and attention.

    The last layer finishes the window's rows only, but makes keys and values of all.
    """
    row_layers, window = plan.row_layers(shape.layers), len(plan.window)
    finished = row_layers - plan.num_rows + window
    products = shape.product_operations(row_layers, finished)
    attention = shape.attention_operations(finished * len(plan.tokens))
    return products + attention + shape.head_operations(window)


def bytes_moved(shape: ModelShape, plans: Sequence[PassPlan]) -> int:
    """Bytes that a pass reads and writes at least.

    Of every layer that has rows the weights once, for all plans; each canvas's keys and values
    once, those of its rows written; the rows' inputs, stored by the layers that keep them (all but
    layer 0) and read where rows join. Then the head's weights. What stays on the chip between two
    operators is not counted, nor is what a measurement reads: the attention has just read it.
    """
    rows = np.array([_rows(shape, plan) for plan in plans])
    active = rows > 0
    weights = shape.parameters_read(rows.sum(axis=0)) @ active.any(axis=0) + shape.head_parameters
    lengths = np.array([len(plan.tokens) for plan in plans])
    keys = 2 * shape.key_width * (lengths @ active.sum(axis=1) + rows.sum())
    # A row's input is written where it was active in the layer before, and read where it joins.
    stored = rows[:, :-1].sum()
    joining = sum(len(s.positions) for plan in plans for s in plan.segments if s.join_layer)
    return int(shape.bytes_per_number * (weights + keys + shape.width * (stored + joining)))


def _rows(shape: ModelShape, plan: PassPlan) -> list[int]:
    """A plan's rows in every layer."""
    layers = range(shape.layers)
    return [sum(len(s.positions) for s in plan.segments if s.join_layer <= n) for n in layers]


def measured_rates(dtype: str, device: str) -> Rates:
    """The rates of this process, here and now: the fastest of several, as a floor has to lie
    below."""
    import torch

    from vllm_elastic.bench.pass_time import clock

    side, num_bytes, calls = (8192, 1 << 28, 20) if device == "cuda" else (1024, 1 << 26, 1)
    options = {"dtype": getattr(torch, dtype), "device": device}
    a, b = torch.randn(side, side, **options), torch.randn(side, side, **options)
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    fastest = []
    for work in (lambda: torch.mm(a, b), lambda: target.copy_(source)):
        times = []
        for _ in range(12):
            started = clock()
            for _ in range(calls):  # a GPU's launch and its wait are no part of the rate
                work()
            times.append((clock() - started) / calls)
        fastest.append(min(times))
    return Rates(2 * side**3 / fastest[0], 2 * num_bytes / fastest[1])
