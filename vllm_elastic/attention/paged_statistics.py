# SPDX-License-Identifier: Apache-2.0
"""Attention mass and drift of all plans of a pass, by Triton, over paged keys in their own type.

Each method is a launch, however many plans and layers there are, and has its obviously right twin
in ``naive.py``. Imported where there is a GPU, and by tests in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from vllm_elastic.attention import paged_kernels as kernels
from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.attention.paged_kernels import PAPER, RELEASED, PlanEntry

_POSITIONS_OF_FOLD = 64
_LOG2_E = 1.4426950408889634
"""The kernels' exponential is of base 2."""


@dataclass(slots=True)
class PagedKeys:
    """Keys of all layers, where the backend keeps them: [L, blocks, Hkv, block_size, C]."""

    cache: torch.Tensor
    layout: KeyLayout


@dataclass(slots=True)
class Before:
    """What tested rows need of the state before the pass, in the keys' type and contiguous.

    Attributes:
        queries: [L, M, Hq, D]; keys: [L, K, Hkv, D], those that the pass overwrote.
        written_at: int32, for each position of each plan that tests, where among these keys its
            own is, or -1.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    written_at: torch.Tensor


@dataclass(slots=True)
class Rows:
    """Rows of all plans.

    Attributes:
        queries: [L, S, Hq, D], in the keys' type and contiguous.
        in_window: float32 [S], 1 for the window's.
        blocks: int32, the kernels' blocks of the plans, one plan's behind the other's.
        tested: int64 [M], the tested rows among the queries.
        before: None: no plan tests.
        hidden_stride: every n-th layer stores its input, and is tested.
    """

    queries: torch.Tensor
    in_window: torch.Tensor
    blocks: torch.Tensor
    tested: torch.Tensor
    before: Before | None
    hidden_stride: int


@dataclass(slots=True)
class PagedReading:
    """Plans whose attention is read by one launch, in some of the layers that each looks at.

    Attributes:
        plans: int32 [plans, fields], a ``PlanEntry`` each.
        first, stop: the layers are a plan's ``first``-th to, without it, its ``stop``-th.
        num_positions: T of all plans together.
        longest: the greatest T; most_tested: the greatest number of tested rows.
        num_sums: how many numbers ``PlanEntry.first_sum`` counts, by statistic.
    """

    plans: torch.Tensor
    first: int
    stop: int
    num_positions: int
    longest: int
    most_tested: int
    num_sums: dict[int, int]


class PagedStatistics:
    """The kernels over one pass's keys and rows.

    Args:
        scale: of the scores.
    """

    def __init__(self, keys: PagedKeys, rows: Rows, scale: float) -> None:
        self._rows = rows
        states = [rows.queries]
        if rows.before is not None:
            states += [rows.before.queries, rows.before.keys]
        assert all(state.is_contiguous() for state in states)
        cache, layout = keys.cache, keys.layout
        self._num_layers, _, self._kv_heads, block_size, width = cache.shape
        _, self._num_queries, heads, dim = rows.queries.shape
        self._num_tested = len(rows.tested)
        group = heads // self._kv_heads
        # Nothing here depends on the pass: one compilation, and the same order of additions.
        self._shape: dict[str, Any] = dict(
            KV_HEADS=self._kv_heads,
            GROUP=group,
            DIM=dim,
            BLOCK_DIM=max(16, triton.next_power_of_2(dim)),
            BLOCK_SIZE=block_size,
            PLAIN=layout.plain,
            BLOCK_ROWS=32 if group == 1 or cache.element_size() == 4 else 64,
            BLOCK_KEYS=64 if cache.element_size() == 2 else 32,
        )
        self._paged = (cache, layout.offsets, rows.blocks, *cache.stride(), width)
        self._scale = scale * _LOG2_E

    def read(self, reading: PagedReading) -> Attention:
        """The softmax's sums of all rows, and the windows' mass, in some layers: one launch."""
        rows = self._rows
        layers, device = reading.stop - reading.first, rows.queries.device
        num_rows = self._num_queries + self._num_tested
        lse = torch.empty(layers, self._kv_heads, num_rows * self._shape["GROUP"], device=device)
        mass = torch.empty(layers, self._kv_heads, reading.num_positions, device=device)
        kernels.mass_kernel[self._kv_heads, layers, len(reading.plans)](
            *self._paged,
            reading.plans,
            *self._states(),
            rows.in_window,
            lse,
            mass,
            reading.first,
            reading.num_positions,
            self._num_queries,
            self._num_tested,
            self._num_layers,
            rows.hidden_stride,
            self._scale,
            TESTS=rows.before is not None,
            **self._shape,
        )
        return Attention(reading, lse, mass)

    def drift_sums(self, attention: Attention, statistic: int) -> torch.Tensor:
        """What adds up over ranks of the plans that test by a statistic: one launch.

        Returns:
            ``RELEASED``: float32 [3, sums], of each plan [tested layers, M, T] dot products and
            squared norms across the heads; ``PAPER``: float32 [1, sums], of each plan
            [tested layers, Hkv] cosines added up over the head's rows.
        """
        reading, rows = attention.reading, self._rows
        released = statistic == RELEASED
        kernel = kernels.released_kernel if released else kernels.paper_kernel
        count = reading.num_sums[statistic]
        sums = torch.empty(3 if released else 1, count, device=attention.lse.device)
        shape, across = self._shape, self._kv_heads
        if released:  # members of a group are not packed: few rows
            shape = shape | {"BLOCK_ROWS": 32}
            tiles = triton.cdiv(reading.longest, shape["BLOCK_KEYS"])
            across = tiles * triton.cdiv(reading.most_tested, shape["BLOCK_ROWS"])
        kernel[across, reading.stop - reading.first, len(reading.plans)](
            *self._paged,
            reading.plans,
            *self._states(),
            rows.tested,
            attention.lse,
            sums,
            reading.first,
            count,
            self._num_queries,
            self._num_tested,
            self._num_layers,
            rows.hidden_stride,
            self._scale,
            num_stages=2,  # keys twice, and queries: three do not fit into 99 KiB
            **shape,
        )
        return sums

    def similarities(
        self,
        reading: PagedReading,
        statistic: int,
        sums: torch.Tensor,
        num_heads: int,
        out: torch.Tensor,
    ) -> None:
        """Means of the sums of all ranks, to float32 [plans, stored layers]: one launch.

        Args:
            num_heads: query heads of all ranks.
        """
        stride = self._rows.hidden_stride
        kernels.similarity_kernel[-(-(reading.stop - reading.first) // stride), len(reading.plans)](
            reading.plans,
            sums,
            out,
            reading.first,
            reading.stop,
            sums.shape[1],
            out.shape[1],
            num_heads,
            self._num_layers,
            stride,
            STATISTIC=statistic,
            KV_HEADS=self._kv_heads,
            BLOCK=1024,
        )

    def add_mass(self, attention: Attention, out: torch.Tensor) -> None:
        """Add the heads' mass up: one launch.

        Args:
            out: contiguous float32 [L, plans, longest T], a layer's own mass is written to;
                or [plans, longest T], to which that of all layers is added.
        """
        reading, by_layer = attention.reading, out.ndim == 3
        layers = reading.stop - reading.first
        tiles = triton.cdiv(reading.longest, _POSITIONS_OF_FOLD)
        kernels.fold_kernel[tiles, layers if by_layer else 1, len(reading.plans)](
            reading.plans,
            attention.mass,
            out,
            reading.first,
            layers,
            reading.num_positions,
            out.shape[-2],
            out.shape[-1],
            self._num_layers,
            BY_LAYER=by_layer,
            KV_HEADS=self._kv_heads,
            BLOCK_HEADS=min(32, triton.next_power_of_2(self._kv_heads)),
            BLOCK=_POSITIONS_OF_FOLD,
        )

    def _states(self) -> tuple[Any, ...]:
        """Queries and keys, and as they were; any tensor of the type where nothing is tested."""
        queries, before = self._rows.queries, self._rows.before
        if before is None:
            return queries, queries, queries, self._rows.blocks, 0
        return queries, before.queries, before.keys, before.written_at, before.keys.shape[1]


@dataclass(slots=True)
class Attention:
    """What ``PagedStatistics.read`` found.

    Attributes:
        lse: float32 [layers, Hkv, (S + M) * group], the softmaxes' logarithms of base 2, of the
            queries and behind them of the tested rows as they were.
        mass: float32 [layers, Hkv, positions of all plans].
    """

    reading: PagedReading
    lse: torch.Tensor
    mass: torch.Tensor


def warm_up(
    keys: PagedKeys, num_heads: int, num_heads_of_all_ranks: int, hidden_stride: int
) -> None:
    """Compile all that a pass may launch, so that no request waits for it: seconds, once.

    By a pass of one row of one position, of vLLM's null block.
    """
    cache, dim = keys.cache, keys.layout.head_dim
    num_layers, kv_heads = len(cache), cache.shape[2]

    def zeros(*shape: int, dtype: torch.dtype = cache.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=cache.device)

    queries = zeros(num_layers, 1, num_heads, dim)
    first_block, first_row = zeros(1, dtype=torch.int32), zeros(1, dtype=torch.int64)
    before = Before(queries, zeros(num_layers, 1, kv_heads, dim), first_block)
    shared = zeros(1, dtype=torch.float32), first_block, first_row
    for statistic in (0, RELEASED, PAPER):
        rows = Rows(queries, *shared, before if statistic else None, hidden_stride)
        statistics = PagedStatistics(keys, rows, 1.0)
        plan = PlanEntry(0, 0, 1, 1, 0, 0, 1, 0, statistic, num_tested=1, stop_stored=1)
        plans = torch.tensor([plan], dtype=torch.int32, device=cache.device)
        reading = PagedReading(plans, 0, 1, 1, 1, 1, {RELEASED: 1, PAPER: kv_heads})
        attention = statistics.read(reading)
        for sizes in ((num_layers, 1, 1), (1, 1)):
            statistics.add_mass(attention, zeros(*sizes, dtype=torch.float32))
        if statistic:
            sums = statistics.drift_sums(attention, statistic)
            out = zeros(1, num_layers, dtype=torch.float32)
            statistics.similarities(reading, statistic, sums, num_heads_of_all_ranks, out)
