# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels of ``paged_statistics``, and the table by which they know a pass's plans.

A program has one KV head, one layer and one plan, and the keys that it reads stay in the GPU's L2
cache between its two looks at them: first for the sum of each row's softmax, then for the mass.
What several programs add to is written by each on its own and summed in a fixed order, never by
atomic additions: so a request's numbers do not depend on those that it shares a pass with.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from vllm_elastic.attention.attention_statistics import NORM_FLOOR

RELEASED, PAPER = 1, 2
"""``PlanEntry.statistic``."""


class PlanEntry(NamedTuple):
    """One plan, as the kernels read it from an int32 table.

    Attributes:
        place: in what all plans share.
        first_layer, layer_stride: its attention is read in ``first_layer + i * layer_stride``.
        length: T; first_position: how many positions the plans before it in the reading have.
        first_block: of its KV blocks, in the pass's list of them.
        first_query, num_queries: its rows among the saved queries.
        statistic: 0: nothing is tested.
        first_tested, num_tested: its rows among the tested ones.
        first_written: of its positions, in ``Rows.written_at``.
        stop_stored: of the layers that store their input, so many from layer 0 on are tested.
        first_sum: of its sums, in the reading.
    """

    place: int
    first_layer: int
    layer_stride: int
    length: int
    first_block: int
    first_query: int
    num_queries: int
    first_position: int = 0
    statistic: int = 0
    first_tested: int = 0
    num_tested: int = 0
    first_written: int = 0
    stop_stored: int = 0
    first_sum: int = 0


def _field(name: str) -> Any:
    return tl.constexpr(PlanEntry._fields.index(name))


_FIELDS = tl.constexpr(len(PlanEntry._fields))
_PLACE = _field("place")
_FIRST_LAYER, _LAYER_STRIDE = _field("first_layer"), _field("layer_stride")
_LENGTH, _FIRST_POSITION = _field("length"), _field("first_position")
_FIRST_BLOCK = _field("first_block")
_FIRST_QUERY, _NUM_QUERIES = _field("first_query"), _field("num_queries")
_STATISTIC, _STOP_STORED = _field("statistic"), _field("stop_stored")
_FIRST_TESTED, _NUM_TESTED = _field("first_tested"), _field("num_tested")
_FIRST_WRITTEN, _FIRST_SUM = _field("first_written"), _field("first_sum")
_RELEASED, _PAPER = tl.constexpr(RELEASED), tl.constexpr(PAPER)
_NORM_FLOOR = tl.constexpr(NORM_FLOOR)

# These differ from pass to pass: a compilation for those that are 1, or a multiple of 16, would
# stop a request.
_VARYING = ["first", "stop", "layers", "longest"] + [
    f"num_{what}"
    for what in ("old_keys", "plans", "positions", "queries", "stored", "sums", "tested")
]


@triton.jit
def _key_tile(
    keys_of_head,
    offsets,
    blocks,
    at,
    own,
    dim,
    stride_block,
    stride_slot,
    stride_number,
    width,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Keys [BLOCK_DIM, BLOCK_KEYS] of positions ``at``; 0 where a position is not the plan's."""
    block = tl.load(blocks + at // BLOCK_SIZE, mask=own, other=0).to(tl.int64)
    slot = at % BLOCK_SIZE
    mask = own[None, :] & (dim < DIM)[:, None]
    if PLAIN:
        inside = slot[None, :] * stride_slot + dim[:, None] * stride_number
    else:
        place = tl.load(offsets + dim[:, None] * BLOCK_SIZE + slot[None, :], mask=mask, other=0)
        inside = place // width * stride_slot + place % width * stride_number
    return tl.load(keys_of_head + block[None, :] * stride_block + inside, mask=mask, other=0.0)


@triton.jit
def _as_they_were(
    keys, old_keys_of_head, written_at, at, own, dim, KV_HEADS: tl.constexpr, DIM: tl.constexpr
):
    """The keys as they were before the pass: those that it overwrote were kept."""
    place = tl.load(written_at + at, mask=own, other=-1)
    written = (place >= 0)[None, :]
    old = tl.load(
        old_keys_of_head + place.to(tl.int64)[None, :] * (KV_HEADS * DIM) + dim[:, None],
        mask=written & (dim < DIM)[:, None],
        other=0.0,
    )
    return tl.where(written, old, keys)


@triton.jit
def _query_tile(queries_of_head, row, member, is_row, dim, HEADS: tl.constexpr, DIM: tl.constexpr):
    """Queries [BLOCK_ROWS, BLOCK_DIM] of rows, each of one member of the KV head's group."""
    return tl.load(
        queries_of_head + (row.to(tl.int64) * HEADS + member)[:, None] * DIM + dim[None, :],
        mask=is_row[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _scores(queries, keys, scale):
    """Scores of base 2. Nothing is rounded: neither float32 to TF32 nor what is half as wide."""
    return tl.dot(queries, keys, input_precision="ieee") * scale


@triton.jit
def _tested_layer(plan, first, nth, num_layers, hidden_stride, STATISTIC: tl.constexpr):
    """The ``nth`` layer of a reading, which of the plan's stored ones it is there, and whether
    the plan's test looks at it. A plan that tests is read in every layer."""
    first_own = tl.load(plan + _FIRST_LAYER) + first
    layer = first_own + nth
    stop = tl.minimum(num_layers, tl.load(plan + _STOP_STORED) * hidden_stride)
    tests = (tl.load(plan + _STATISTIC) == STATISTIC) & (layer % hidden_stride == 0)
    nth_stored = layer // hidden_stride - tl.cdiv(first_own, hidden_stride)
    return layer.to(tl.int64), nth_stored, tests & (layer < stop)


@triton.jit
def _store_lse(
    queries_of_head,
    num_rows,
    lse_of_head,
    keys_of_head,
    offsets,
    blocks,
    old_keys_of_head,
    written_at,
    length,
    scale,
    stride_block,
    stride_slot,
    stride_number,
    width,
    OLD: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Logarithms of the sums of each row's softmax, rows packed with their group's members."""
    dim = tl.arange(0, BLOCK_DIM)
    for start in range(0, num_rows * GROUP, BLOCK_ROWS):
        packed = start + tl.arange(0, BLOCK_ROWS)
        is_row = packed < num_rows * GROUP
        q = _query_tile(
            queries_of_head, packed // GROUP, packed % GROUP, is_row, dim, KV_HEADS * GROUP, DIM
        )
        most = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        for first_key in range(0, length, BLOCK_KEYS):
            at = first_key + tl.arange(0, BLOCK_KEYS)
            own = at < length
            k = _key_tile(
                keys_of_head,
                offsets,
                blocks,
                at,
                own,
                dim,
                stride_block,
                stride_slot,
                stride_number,
                width,
                DIM,
                BLOCK_SIZE,
                PLAIN,
            )
            if OLD:
                k = _as_they_were(k, old_keys_of_head, written_at, at, own, dim, KV_HEADS, DIM)
            scores = tl.where(own[None, :], _scores(q, k, scale), float("-inf"))
            most_yet = tl.maximum(most, tl.max(scores, 1))
            total *= tl.exp2(most - most_yet)
            total += tl.sum(tl.exp2(scores - most_yet[:, None]), 1)
            most = most_yet
        tl.store(lse_of_head + packed, most + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=_VARYING)
def mass_kernel(
    cache,
    offsets,
    blocks,
    stride_layer,
    stride_block,
    stride_head,
    stride_slot,
    stride_number,
    width,
    plans,
    queries,
    old_queries,
    old_keys,
    written_at,
    num_old_keys,
    in_window,
    lse,
    mass,
    first,
    num_positions,
    num_queries,
    num_tested,
    num_layers,
    hidden_stride,
    scale,
    TESTS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One KV head of one layer of one plan: lse of all its rows, then its windows' mass."""
    head, nth = tl.program_id(0), tl.program_id(1)
    plan = plans + tl.program_id(2) * _FIELDS
    layer = tl.load(plan + _FIRST_LAYER) + (first + nth) * tl.load(plan + _LAYER_STRIDE)
    if layer >= num_layers:
        return
    layer = layer.to(tl.int64)
    length, first_query = tl.load(plan + _LENGTH), tl.load(plan + _FIRST_QUERY)
    own_rows, own_tested = tl.load(plan + _NUM_QUERIES), tl.load(plan + _NUM_TESTED)
    first_tested = tl.load(plan + _FIRST_TESTED)
    blocks += tl.load(plan + _FIRST_BLOCK)
    cache += layer * stride_layer + head * stride_head
    of_head = head * GROUP * DIM
    queries += (layer * num_queries + first_query) * (KV_HEADS * GROUP * DIM) + of_head
    place = (nth * KV_HEADS + head).to(tl.int64)
    lse += place * (num_queries + num_tested) * GROUP
    mass += place * num_positions + tl.load(plan + _FIRST_POSITION)
    _store_lse(
        queries,
        own_rows,
        lse + first_query * GROUP,
        cache,
        offsets,
        blocks,
        old_keys,
        written_at,
        length,
        scale,
        stride_block,
        stride_slot,
        stride_number,
        width,
        False,
        KV_HEADS,
        GROUP,
        DIM,
        BLOCK_DIM,
        BLOCK_SIZE,
        PLAIN,
        BLOCK_ROWS,
        BLOCK_KEYS,
    )
    if TESTS:
        stop = tl.load(plan + _STOP_STORED) * hidden_stride
        if (own_tested > 0) & (layer % hidden_stride == 0) & (layer < stop):
            old_queries += (layer * num_tested + first_tested) * (KV_HEADS * GROUP * DIM)
            _store_lse(
                old_queries + of_head,
                own_tested,
                lse + (num_queries + first_tested) * GROUP,
                cache,
                offsets,
                blocks,
                old_keys + (layer * num_old_keys * KV_HEADS + head) * DIM,
                written_at + tl.load(plan + _FIRST_WRITTEN),
                length,
                scale,
                stride_block,
                stride_slot,
                stride_number,
                width,
                True,
                KV_HEADS,
                GROUP,
                DIM,
                BLOCK_DIM,
                BLOCK_SIZE,
                PLAIN,
                BLOCK_ROWS,
                BLOCK_KEYS,
            )
    tl.debug_barrier()  # other threads read what these have stored
    dim = tl.arange(0, BLOCK_DIM)
    for first_key in range(0, length, BLOCK_KEYS):
        at = first_key + tl.arange(0, BLOCK_KEYS)
        own = at < length
        k = _key_tile(
            cache,
            offsets,
            blocks,
            at,
            own,
            dim,
            stride_block,
            stride_slot,
            stride_number,
            width,
            DIM,
            BLOCK_SIZE,
            PLAIN,
        )
        paid = tl.zeros([BLOCK_KEYS], tl.float32)
        for start in range(0, own_rows * GROUP, BLOCK_ROWS):
            packed = start + tl.arange(0, BLOCK_ROWS)
            row = packed // GROUP
            is_row = packed < own_rows * GROUP
            q = _query_tile(queries, row, packed % GROUP, is_row, dim, KV_HEADS * GROUP, DIM)
            counts = tl.load(in_window + first_query + row, mask=is_row, other=0.0)
            norm = tl.load(lse + first_query * GROUP + packed, mask=is_row, other=0.0)
            attention = tl.exp2(_scores(q, k, scale) - norm[:, None])
            paid += tl.sum(tl.where(counts[:, None] > 0, attention, 0.0), 0)
        tl.store(mass + at, paid, mask=own)


@triton.jit(do_not_specialize=_VARYING)
def released_kernel(
    cache,
    offsets,
    blocks,
    stride_layer,
    stride_block,
    stride_head,
    stride_slot,
    stride_number,
    width,
    plans,
    queries,
    old_queries,
    old_keys,
    written_at,
    num_old_keys,
    tested,
    lse,
    sums,
    first,
    num_sums,
    num_queries,
    num_tested,
    num_layers,
    hidden_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Some tested rows and keys of one layer of one plan: products of old and new over heads."""
    tile, nth = tl.program_id(0), tl.program_id(1)
    plan = plans + tl.program_id(2) * _FIELDS
    length, own_tested = tl.load(plan + _LENGTH), tl.load(plan + _NUM_TESTED)
    key_tiles = tl.cdiv(length, BLOCK_KEYS)
    first_row, first_key = tile // key_tiles * BLOCK_ROWS, tile % key_tiles * BLOCK_KEYS
    layer, stored, tests = _tested_layer(plan, first, nth, num_layers, hidden_stride, _RELEASED)
    if not (tests & (first_row < own_tested)):
        return
    first_tested = tl.load(plan + _FIRST_TESTED)
    blocks += tl.load(plan + _FIRST_BLOCK)
    written_at += tl.load(plan + _FIRST_WRITTEN)
    row = first_row + tl.arange(0, BLOCK_ROWS)
    is_row = row < own_tested
    query = tl.load(tested + first_tested + row, mask=is_row, other=0)
    at = first_key + tl.arange(0, BLOCK_KEYS)
    own = at < length
    dim = tl.arange(0, BLOCK_DIM)
    cache += layer * stride_layer
    queries += layer * num_queries * (KV_HEADS * GROUP * DIM)
    old_queries += (layer * num_tested + first_tested) * (KV_HEADS * GROUP * DIM)
    old_keys += layer * num_old_keys * (KV_HEADS * DIM)
    both = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    before = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    after = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    for head in range(KV_HEADS):
        k = _key_tile(
            cache + head * stride_head,
            offsets,
            blocks,
            at,
            own,
            dim,
            stride_block,
            stride_slot,
            stride_number,
            width,
            DIM,
            BLOCK_SIZE,
            PLAIN,
        )
        old_k = _as_they_were(k, old_keys + head * DIM, written_at, at, own, dim, KV_HEADS, DIM)
        place = (nth * KV_HEADS + head).to(tl.int64)
        norms = lse + place * (num_queries + num_tested) * GROUP
        for member in range(GROUP):
            of_head = (head * GROUP + member) * DIM
            q = _query_tile(queries + of_head, query, 0, is_row, dim, KV_HEADS * GROUP, DIM)
            norm = tl.load(norms + query * GROUP + member, mask=is_row, other=0.0)
            new = tl.exp2(_scores(q, k, scale) - norm[:, None])
            q = _query_tile(old_queries + of_head, row, 0, is_row, dim, KV_HEADS * GROUP, DIM)
            old_row = num_queries + first_tested + row
            norm = tl.load(norms + old_row * GROUP + member, mask=is_row, other=0.0)
            old = tl.exp2(_scores(q, old_k, scale) - norm[:, None])
            both += old * new
            before += old * old
            after += new * new
    sums += tl.load(plan + _FIRST_SUM) + stored.to(tl.int64) * own_tested * length
    places = row.to(tl.int64)[:, None] * length + at[None, :]
    mask = is_row[:, None] & own[None, :]
    tl.store(sums + places, both, mask=mask)
    tl.store(sums + num_sums + places, before, mask=mask)
    tl.store(sums + 2 * num_sums + places, after, mask=mask)


@triton.jit(do_not_specialize=_VARYING)
def paper_kernel(
    cache,
    offsets,
    blocks,
    stride_layer,
    stride_block,
    stride_head,
    stride_slot,
    stride_number,
    width,
    plans,
    queries,
    old_queries,
    old_keys,
    written_at,
    num_old_keys,
    tested,
    lse,
    sums,
    first,
    num_sums,
    num_queries,
    num_tested,
    num_layers,
    hidden_stride,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """One KV head of one layer of one plan: cosines of old and new over keys, of all its rows."""
    head, nth = tl.program_id(0), tl.program_id(1)
    plan = plans + tl.program_id(2) * _FIELDS
    length, own_tested = tl.load(plan + _LENGTH), tl.load(plan + _NUM_TESTED)
    layer, stored, tests = _tested_layer(plan, first, nth, num_layers, hidden_stride, _PAPER)
    if not tests:
        return
    first_tested = tl.load(plan + _FIRST_TESTED)
    blocks += tl.load(plan + _FIRST_BLOCK)
    written_at += tl.load(plan + _FIRST_WRITTEN)
    dim = tl.arange(0, BLOCK_DIM)
    cache += layer * stride_layer + head * stride_head
    of_head = head * GROUP * DIM
    queries += layer * num_queries * (KV_HEADS * GROUP * DIM) + of_head
    old_queries += (layer * num_tested + first_tested) * (KV_HEADS * GROUP * DIM) + of_head
    old_keys += (layer * num_old_keys * KV_HEADS + head) * DIM
    place = (nth * KV_HEADS + head).to(tl.int64)
    norms = lse + place * (num_queries + num_tested) * GROUP
    total = 0.0
    for start in range(0, own_tested * GROUP, BLOCK_ROWS):
        packed = start + tl.arange(0, BLOCK_ROWS)
        row, member = packed // GROUP, packed % GROUP
        is_row = packed < own_tested * GROUP
        query = tl.load(tested + first_tested + row, mask=is_row, other=0)
        q = _query_tile(queries, query, member, is_row, dim, KV_HEADS * GROUP, DIM)
        old_q = _query_tile(old_queries, row, member, is_row, dim, KV_HEADS * GROUP, DIM)
        norm = tl.load(norms + query * GROUP + member, mask=is_row, other=0.0)
        old_row = num_queries + first_tested + row
        old_norm = tl.load(norms + old_row * GROUP + member, mask=is_row, other=0.0)
        both = tl.zeros([BLOCK_ROWS], tl.float32)
        before = tl.zeros([BLOCK_ROWS], tl.float32)
        after = tl.zeros([BLOCK_ROWS], tl.float32)
        for first_key in range(0, length, BLOCK_KEYS):
            at = first_key + tl.arange(0, BLOCK_KEYS)
            own = at < length
            k = _key_tile(
                cache,
                offsets,
                blocks,
                at,
                own,
                dim,
                stride_block,
                stride_slot,
                stride_number,
                width,
                DIM,
                BLOCK_SIZE,
                PLAIN,
            )
            new = tl.exp2(_scores(q, k, scale) - norm[:, None])
            k = _as_they_were(k, old_keys, written_at, at, own, dim, KV_HEADS, DIM)
            old = tl.exp2(_scores(old_q, k, scale) - old_norm[:, None])
            new = tl.where(own[None, :], new, 0.0)
            old = tl.where(own[None, :], old, 0.0)
            both += tl.sum(old * new, 1)
            before += tl.sum(old * old, 1)
            after += tl.sum(new * new, 1)
        cosines = _cosines(both, before, after)
        total += tl.sum(tl.where(is_row, cosines, 0.0), 0)
    tl.store(sums + tl.load(plan + _FIRST_SUM) + stored * KV_HEADS + head, total)


@triton.jit
def _cosines(both, before, after):
    before = tl.maximum(tl.sqrt_rn(before), _NORM_FLOOR)
    return both / before / tl.maximum(tl.sqrt_rn(after), _NORM_FLOOR)


@triton.jit(do_not_specialize=_VARYING)
def similarity_kernel(
    plans,
    sums,
    out,
    first,
    stop,
    num_sums,
    num_stored,
    num_heads,
    num_layers,
    hidden_stride,
    STATISTIC: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One layer of one plan: the mean of its cosines."""
    nth = tl.program_id(0)
    plan = plans + tl.program_id(1) * _FIELDS
    first_layer = tl.load(plan + _FIRST_LAYER)
    stored = tl.cdiv(first_layer + first, hidden_stride) + nth
    layer = stored * hidden_stride
    tests = (tl.load(plan + _STATISTIC) == STATISTIC) & (stored < tl.load(plan + _STOP_STORED))
    if not (tests & (layer < first_layer + stop) & (layer < num_layers)):
        return
    length, own_tested = tl.load(plan + _LENGTH), tl.load(plan + _NUM_TESTED)
    if STATISTIC == _RELEASED:
        count = own_tested * length
    else:
        count = KV_HEADS
    sums += tl.load(plan + _FIRST_SUM) + nth.to(tl.int64) * count
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < count
        part = tl.load(sums + at, mask=mask, other=0.0)
        if STATISTIC == _RELEASED:
            before = tl.load(sums + num_sums + at, mask=mask, other=0.0)
            after = tl.load(sums + 2 * num_sums + at, mask=mask, other=0.0)
            part = _cosines(part, before, after)
        total += part
    if STATISTIC != _RELEASED:
        count = num_heads * own_tested
    tl.store(out + tl.load(plan + _PLACE) * num_stored + stored, tl.sum(total, 0) / count)


@triton.jit(do_not_specialize=_VARYING)
def fold_kernel(
    plans,
    mass,
    out,
    first,
    layers,
    num_positions,
    num_plans,
    longest,
    num_layers,
    BY_LAYER: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some positions of one plan: mass added up over heads, and over layers where asked for.

    Layer by layer, whatever the reading is: cutting changes no sum.
    """
    plan = plans + tl.program_id(2) * _FIELDS
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = at < tl.load(plan + _LENGTH)
    stride = tl.load(plan + _LAYER_STRIDE)
    first_own = tl.load(plan + _FIRST_LAYER) + first * stride
    mass += tl.load(plan + _FIRST_POSITION)
    out += tl.load(plan + _PLACE).to(tl.int64) * longest
    if BY_LAYER:
        start = tl.program_id(1)
        stop = start + 1
        out += (first_own + start * stride).to(tl.int64) * num_plans * longest
        total = tl.zeros([BLOCK], tl.float32)
    else:
        start = 0
        stop = layers
        total = tl.load(out + at, mask=own, other=0.0)
    stop = tl.minimum(stop, tl.cdiv(num_layers - first_own, stride))
    for i in range(start, stop):
        of_layer = tl.zeros([BLOCK], tl.float32)
        for first_head in range(0, KV_HEADS, BLOCK_HEADS):
            head = first_head + tl.arange(0, BLOCK_HEADS)
            places = (i * KV_HEADS + head).to(tl.int64)[:, None] * num_positions + at[None, :]
            mask = (head < KV_HEADS)[:, None] & own[None, :]
            of_layer += tl.sum(tl.load(mass + places, mask=mask, other=0.0), 0)
        total += of_layer
    if start < stop:
        tl.store(out + at, total, mask=own)
