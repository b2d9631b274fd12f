# SPDX-License-Identifier: Apache-2.0
"""Made-up passes for the kernels, and what ``naive`` says of each of their plans."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from tests import triton_interpreter  # noqa: F401
from tests.device import DEVICE
from vllm_elastic.attention import naive
from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.attention.paged_statistics import (
    PAPER,
    RELEASED,
    Before,
    PagedKeys,
    PagedReading,
    PagedStatistics,
    PlanEntry,
    Rows,
)

from .test_key_layout import MadeUpBackend, make_layer, offsets

SCALE = 0.3
NAN = float("nan")
STATISTICS = {RELEASED: "released", PAPER: "paper"}


@dataclass
class Shape:
    """Of a model and its cache."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    block_size: int = 16
    hidden_stride: int = 1
    dtype: torch.dtype = torch.float32
    kind: str = "gpu-keys-beside-values"
    heads_first: bool = False


@dataclass
class Plan:
    """What one request asks of the pass.

    Attributes:
        window: number of its rows; tested: which of its queries are compared, by their number.
        written: positions whose keys the pass overwrites.
        stop_stored: so many of the layers that store their input are tested.
    """

    length: int
    window: int
    first_layer: int = 0
    layer_stride: int = 1
    statistic: int = 0
    tested: list[int] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    stop_stored: int = 99


class PagedPass:
    """Keys in scattered blocks of a cache that is NaN wherever no plan has a key."""

    def __init__(self, shape: Shape, plans: list[Plan], seed: int = 0) -> None:
        self.shape, self.plans = shape, plans
        self._generator = torch.Generator().manual_seed(seed)
        self._scatter()
        # A tested row that is not the window's is a query of its own.
        self.num_own = [max([plan.window - 1, *plan.tested]) + 1 for plan in plans]
        num_tested = sum(len(plan.tested) for plan in plans)
        layers, heads, dim = shape.layers, shape.heads, shape.dim
        # Unused rows are behind, between and before those that are used: one before each plan.
        self.first_query, count = [], 0
        for own in self.num_own:
            self.first_query.append(count + 1)
            count += 1 + own
        self.queries = self._random(layers, count, heads, dim)
        self.queries[:, [first - 1 for first in self.first_query]] = NAN
        for plan, first, own in zip(plans, self.first_query, self.num_own, strict=True):
            self.queries[: plan.first_layer, first : first + own] = NAN
        self.old_queries = self._random(layers, num_tested, heads, dim)
        self.old_keys = [
            self._random(layers, len(plan.written), shape.kv_heads, dim) for plan in plans
        ]
        self.old_queries[[i for i in range(layers) if i % shape.hidden_stride]] = NAN

    def statistics(self) -> PagedStatistics:
        num_queries = self.queries.shape[1]
        in_window = torch.zeros(num_queries)
        tested, written_at, num_old = [], [], 0
        for plan, first in zip(self.plans, self.first_query, strict=True):
            in_window[first : first + plan.window] = 1
            if plan.tested:
                tested += [first + row for row in plan.tested]
                places = torch.full((plan.length,), -1, dtype=torch.int32)
                places[plan.written] = torch.arange(len(plan.written)).int() + num_old
                written_at.append(places)
                num_old += len(plan.written)
        before = None
        if tested:
            old_keys = [k for k, p in zip(self.old_keys, self.plans, strict=True) if p.tested]
            before = Before(
                self.old_queries.to(DEVICE),
                torch.cat(old_keys, dim=1).to(DEVICE),
                torch.cat(written_at).to(DEVICE),
            )
        rows = Rows(
            queries=self.queries.to(DEVICE),
            in_window=in_window.to(DEVICE),
            blocks=torch.tensor([*itertools.chain(*self.tables)], dtype=torch.int32, device=DEVICE),
            tested=torch.tensor(tested, dtype=torch.int64, device=DEVICE),
            before=before,
            hidden_stride=self.shape.hidden_stride,
        )
        return PagedStatistics(self.keys, rows, SCALE)

    def reading(self, first: int, stop: int) -> PagedReading:
        entries, sums = [], {RELEASED: 0, PAPER: 0}
        position = block = tested = written = 0
        for plan, query, own in zip(self.plans, self.first_query, self.num_own, strict=True):
            entries.append(
                PlanEntry(
                    place=len(entries),
                    first_layer=plan.first_layer,
                    layer_stride=plan.layer_stride,
                    length=plan.length,
                    first_position=position,
                    first_block=block,
                    first_query=query,
                    num_queries=own,
                    statistic=plan.statistic,
                    first_tested=tested,
                    num_tested=len(plan.tested),
                    first_written=written,
                    stop_stored=plan.stop_stored,
                    first_sum=sums.get(plan.statistic, 0),
                )
            )
            position += plan.length
            block += -(-plan.length // self.shape.block_size)
            tested += len(plan.tested)
            if plan.tested:
                written += plan.length
                each = len(plan.tested) * plan.length
                if plan.statistic == PAPER:
                    each = self.shape.kv_heads
                sums[plan.statistic] += each * len(self.tested_layers(plan, first, stop))
        return PagedReading(
            plans=torch.tensor(entries, dtype=torch.int32, device=DEVICE),
            first=first,
            stop=stop,
            num_positions=position,
            longest=max(plan.length for plan in self.plans),
            most_tested=max(len(plan.tested) for plan in self.plans),
            num_sums=sums,
        )

    def layers_of(self, plan: Plan) -> range:
        return range(plan.first_layer, self.shape.layers, plan.layer_stride)

    def tested_layers(self, plan: Plan, first: int, stop: int) -> list[int]:
        stride = self.shape.hidden_stride
        some = list(self.layers_of(plan)[first:stop])
        return [i for i in some if i % stride == 0 and i // stride < plan.stop_stored]

    def alone(self, index: int) -> PagedPass:
        """The same of one plan, over the same keys."""
        other = copy.copy(self)
        first = sum(len(plan.tested) for plan in self.plans[:index])
        own = slice(index, index + 1)
        other.plans, other.tables = self.plans[own], self.tables[own]
        other.num_own, other.first_query = self.num_own[own], self.first_query[own]
        other._own_keys, other.old_keys = self._own_keys[own], self.old_keys[own]
        tested = slice(first, first + len(self.plans[index].tested))
        other.old_queries = self.old_queries[:, tested].contiguous()
        return other

    # What is right.

    def mass(self, index: int) -> torch.Tensor:
        """[layers that it looks at, T] of one plan."""
        plan, first = self.plans[index], self.first_query[index]
        layers = list(self.layers_of(plan))
        window = self.queries[layers, first : first + plan.window]
        attention = naive.attention(window, self._now(index)[layers], SCALE)
        return naive.attention_mass(attention, torch.ones(plan.window))

    def similarities(self, index: int) -> torch.Tensor:
        """[tested layers] of one plan."""
        plan = self.plans[index]
        layers = self.tested_layers(plan, 0, self.shape.layers)
        rows = [self.first_query[index] + row for row in plan.tested]
        new = naive.attention(self.queries[:, rows][layers], self._now(index)[layers], SCALE)
        keys = self._now(index).clone()
        keys[..., plan.written] = self.old_keys[index].permute(0, 2, 3, 1)
        first = sum(len(other.tested) for other in self.plans[:index])
        queries = self.old_queries[layers, first : first + len(plan.tested)]
        old = naive.attention(queries, keys[layers], SCALE)
        return naive.drift_similarity(old, new, STATISTICS[plan.statistic])

    def _now(self, index: int) -> torch.Tensor:
        """[L, Hkv, D, T]."""
        return self._own_keys[index].permute(0, 2, 3, 1)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator).to(self.shape.dtype)

    def _scatter(self) -> None:
        shape, size = self.shape, self.shape.block_size
        counts = [-(-plan.length // size) for plan in self.plans]
        num_blocks = 1 + sum(counts) + 2
        order = (torch.randperm(num_blocks - 1, generator=self._generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(count)] for count in counts]
        sizes = [num_blocks, shape.kv_heads, size, 2 * shape.dim]
        if not shape.heads_first:
            sizes[1], sizes[2] = sizes[2], sizes[1]
        cache = torch.full((shape.layers, *sizes), NAN, dtype=shape.dtype)
        if not shape.heads_first:
            cache = cache.transpose(2, 3)
        impl = MadeUpBackend(offsets(shape.kind, shape.dim, size))
        self._own_keys = [
            self._random(shape.layers, plan.length, shape.kv_heads, shape.dim)
            for plan in self.plans
        ]
        layers: list[Any] = []
        for one in cache:
            layers.append(make_layer(impl, one))
            layers[-1].num_kv_heads = shape.kv_heads
        layout = KeyLayout.measure(layers[0])
        cache[0, 0] = NAN  # nobody's as well
        for keys, table in zip(self._own_keys, self.tables, strict=True):
            at = torch.arange(keys.shape[1])
            slots = torch.tensor(table)[at // size] * size + at % size
            for layer, own in zip(layers, keys, strict=True):
                nan = torch.full_like(own, NAN)
                impl.do_kv_cache_update(layer, own, nan, layer.kv_cache, slots)
        on_device = torch.empty_like(cache, device=DEVICE).copy_(cache)
        layout = KeyLayout(layout.offsets.to(DEVICE), cache.shape[-1])
        self.keys = PagedKeys(on_device, layout)
