# SPDX-License-Identifier: Apache-2.0
"""The rows of a pass on the device: who is where, what fills up, and what attends to what."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.device import DEVICE
from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment
from vllm_elastic.models.rows import PassRows, bucket
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.row_order import NO_ROWS, RowOrder
from vllm_elastic.runner.upload import Upload

LAYERS, BLOCK = 6, 4


class Kernels:
    """Keeps what the attention backend would be told, and counts how often it is."""

    def __init__(self) -> None:
        self.built = 0

    def get_metadata_builder(self) -> Kernels:
        return self

    def build(self, common_prefix_len: int, common_attn_metadata: Any) -> Any:
        self.built += 1
        return common_attn_metadata


def plan(first_block: int, length: int, segments: dict[int, list[int]], window: int) -> PassPlan:
    rows = [Segment(layer, np.array(own, dtype=np.int32)) for layer, own in segments.items()]
    blocks = -(-length // BLOCK)
    return PassPlan(
        "",
        PassKind.WINDOW,
        0,
        rows,
        np.arange(length, dtype=np.int32) + 100 * first_block,
        rows[0].positions[-window:],
        block_ids=np.arange(first_block, first_block + blocks, dtype=np.int32),
    )


def plans() -> list[PassPlan]:
    """The first has rows that join at layers 0, 2 and 4, the second at 0, the third at 2."""
    return [
        plan(1, 23, {0: [3, 7, 8, 9], 2: [0, 1, 2], 4: [20, 21, 22]}, window=3),
        plan(7, 10, {0: [5, 6]}, window=2),
        plan(10, 6, {2: [0, 1, 2, 3, 4, 5]}, window=1),
    ]


def build(
    chunk: int = 1000, tested: int = 0, kernels: Kernels | None = None
) -> tuple[PassRows, RowOrder]:
    cache: Any = SimpleNamespace(block_size=BLOCK, kernel_blocks=lambda blocks: blocks)
    asked = plans()
    order, upload = RowOrder.of(asked, BLOCK), Upload(DEVICE)
    group: Any = kernels or Kernels()
    layout = PassLayout(asked, order, upload, group, cache, chunk)
    positions = np.arange(tested, dtype=np.int64) + 90
    rows = layout.put_rows(LAYERS, positions, NO_ROWS)
    upload.send()
    return rows, order


def test_a_layer_works_on_the_rows_that_have_joined() -> None:
    """Rows would be computed too early, twice or in another's slot."""
    rows, order = build()
    expected = {0: 6, 1: 6, 2: 15, 3: 15, 4: 18, 5: 18}
    for layer, count in expected.items():
        active = rows.layers[layer]
        assert active is not None and active.num_rows == count
        assert active.positions[:count].tolist() == order.positions[:count].tolist()
        assert active.slots[:count].tolist() == order.slots[:count].tolist()
    slots = order.slots.tolist()
    assert len(set(slots)) == len(slots)
    assert slots[0] == 1 * BLOCK + 3 and slots[4] == 8 * BLOCK + 1
    assert rows.tokens[:6].tolist() == [103, 107, 108, 109, 705, 706]


def test_rows_are_found_by_plan_and_position() -> None:
    """A measurement would read another request's rows."""
    _, order = build()
    asked = {2: np.array([1, 4]), 0: np.array([3, 21])}
    found = order.rows_of(asked).tolist()
    wanted = [(plan, position) for plan, own in asked.items() for position in own.tolist()]
    owners = {row: span.plan for span in order.spans for row in range(span.start, span.stop)}
    assert [(owners[row], int(order.positions[row])) for row in found] == wanted
    assert order.rows_of({1: np.array([0])}).tolist() == [-1], "in no segment of the pass"
    assert not len(order.rows_of({}))


@pytest.mark.parametrize("tested", [0, 3, 20])
def test_what_fills_up_is_nobodys(tested: int) -> None:
    """Filling would overwrite keys of a request, or read a position that there is not."""
    rows, _ = build(tested=tested)
    for active in rows.layers:
        assert active is not None
        assert active.num_finished == bucket(active.num_rows)
        assert len(active.positions) == len(active.slots) == bucket(active.num_rows + tested)
        beyond = slice(active.num_rows, None)
        assert active.slots[beyond].max() < BLOCK, "the null block is the first one"
        own = active.positions[beyond]
        assert own[:tested].tolist() == list(range(90, 90 + tested))
        assert not own[tested:].any()
    assert len(rows.tokens) == bucket(6) and not rows.tokens[6:].any()
    assert len(rows.window.rows) == bucket(6) and not rows.window.rows[6:].any()


def test_the_windows_rows() -> None:
    """A request would be given another one's candidates."""
    rows, order = build()
    found = [int(order.positions[row]) for row in rows.window.rows[:6]]
    assert found == [7, 8, 9, 5, 6, 5]


@pytest.mark.parametrize("chunk", [1, 4, 5, 1000])
def test_each_row_attends_to_its_own_canvas(chunk: int) -> None:
    """Rows of a chunk would attend to another canvas, to a part of theirs, or be left out."""
    rows, order = build(chunk)
    owner = np.empty(len(order.positions), dtype=int)
    for span in order.spans:
        owner[span.start : span.stop] = span.plan
    of_window = np.repeat([0, 1, 2], [3, 2, 1])
    lengths, first_blocks = [23, 10, 6], [1, 7, 10]
    for active, owners in [*((layer, owner) for layer in rows.layers), (rows.window, of_window)]:
        assert active is not None
        covered = 0
        for call in active.calls:
            assert call.start == covered and 0 < call.stop - call.start <= chunk
            covered = call.stop
            common = call.metadata
            assert common.causal is False
            assert common.num_actual_tokens == call.stop - call.start
            starts = common.query_start_loc.tolist()
            for sequence, (first, last) in enumerate(pairwise(starts)):
                (plan_of_rows,) = set(owners[call.start + first : call.start + last].tolist())
                assert common.seq_lens[sequence] == lengths[plan_of_rows]
                assert common.block_table_tensor[sequence, 0] == first_blocks[plan_of_rows]
        assert covered == getattr(active, "num_rows", len(of_window))


def test_metadata_is_built_where_it_is_used_first() -> None:
    """The device would wait for that of later layers before the first one begins."""
    kernels = Kernels()
    rows, _ = build(kernels=kernels)
    assert not kernels.built
    seen = {id(active.calls[0].metadata) for active in rows.layers[:4] if active is not None}
    assert kernels.built == len(seen) == 2, "layers 0 and 1 share one, 2 and 3 another"
    assert rows.window.calls[0].metadata is rows.window.calls[0].metadata
    assert kernels.built == 3


@pytest.mark.parametrize("chunk", [4, 1000])
def test_block_tables_have_few_widths(chunk: int) -> None:
    """vLLM's Triton attention is compiled apart for a row stride that is 1 or no multiple of 16:
    the first long canvas would wait for it."""
    rows, _ = build(chunk)
    last = rows.layers[-1]
    assert last is not None
    for call in [*last.calls, *rows.window.calls]:
        table = call.metadata.block_table_tensor
        assert table.stride(0) % 16 == 0
        assert not table[:, 6:].any(), "what fills up is the null block"


def test_passes_have_few_shapes() -> None:
    """A product would be compiled, or a graph captured, for every number of rows."""
    shapes = {bucket(count) for count in range(1, 1025)}
    assert len(shapes) == 40
    assert all(bucket(count) >= count for count in range(5000))
    assert all(bucket(count) < 1.25 * count for count in range(33, 5000))
    assert bucket(0) == 0
