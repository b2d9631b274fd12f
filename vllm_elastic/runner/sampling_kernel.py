# SPDX-License-Identifier: Apache-2.0
"""``candidates.sampled`` and ``as_dream`` of all requests of a pass as one launch.

torch takes some fifty operators for each request, half of them on eight bytes a logit, and sorts
for top-p. Here a program has one row and keeps nothing of it: random numbers are worked out where
they are used, and what top-k and top-p leave is said by the smallest logit that stays, which is
searched for by halving the numbers' bits: of 16 bits, as bfloat16 has them, in 16 looks, which
find the row in the GPU's L2 cache. Of equal logits at top-p's edge the first ones stay, as where
they are sorted stably.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_elastic.runner.candidate_kernel import block_of_row, largest_of_row
from vllm_elastic.runner.draws import Confidence, Draws

_BLOCK = 1024
_WARPS = 8

_BITS_OF = {torch.bfloat16: 16, torch.float16: 19, torch.float32: 32}
"""Upper bits of a float32 that tell two numbers of a type apart."""


def sample_by_kernel(
    logits: torch.Tensor,
    draws: Draws,
    rows: slice,
    token_ids: torch.Tensor,
    probabilities: torch.Tensor,
) -> None:
    """Choose the tokens of the rows that do not take the most probable one, in place.

    Exponentials in float32 and their sums in float64, as ``candidates.most_probable`` has them;
    Gumbel noise, and what it is added to, in float64. The order of a row's sums depends on V
    alone, so its numbers are the same in every batch.

    Args:
        logits: [W, V], constrained already, a row's own numbers one behind the other.
        rows: which of all window rows these are.
        token_ids: int64 [W]; probabilities: float64 [W]. A row with a NaN has probability NaN.
    """
    assert logits.stride(1) == 1
    here = draws.within(rows)
    if here.start == here.stop:
        return
    sampling_kernel[(here.stop - here.start,)](
        logits,
        logits.stride(0),
        draws.integers[here],
        draws.floats[here],
        draws.streams[here],
        token_ids,
        probabilities,
        rows.start,
        logits.shape[1],
        _BITS_OF[logits.dtype],
        Confidence.UNTEMPERED.value,
        Confidence.ENTROPY.value,
        Confidence.MARGIN.value,
        _BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _key(x, BITS: tl.constexpr):
    """int32 that are ordered as the numbers are; a NaN's is any."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 is 0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> (32 - BITS)


@triton.jit
def _key_from(bound, BITS: tl.constexpr):
    """The smallest key of a number that is at least ``bound``, float64."""
    nearest = bound.to(tl.float32)
    key = _key(nearest, 32) + (nearest.to(tl.float64) < bound).to(tl.int32)
    # What a coarser type lacks of the bits is 0, and in a key below 0 it is 1.
    return (key + tl.where(key < 0, 0, (1 << (32 - BITS)) - 1)) >> (32 - BITS)


@triton.jit
def _between(low, high):
    """Half way, rounded down; their sum would not fit."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _weights(x, best, temperature, stays):
    """float64: exponentials of what stays of the tempered logits, else 0."""
    return tl.where(stays, tl.exp((x - best) / temperature.to(tl.float32)), 0.0).to(tl.float64)


@triton.jit
def _kept(x, edge, num_equal, num_before, BITS: tl.constexpr):
    """Whether tokens stay; ``num_before``: how many were at the edge, without and with these."""
    key = _key(x, BITS)
    at_edge = (key == edge).to(tl.int32)
    nth = num_before + tl.cumsum(at_edge, axis=0)
    kept = (key > edge) | ((key == edge) & (nth <= num_equal))
    return kept, num_before + tl.sum(at_edge, axis=0)


@triton.jit
def _noise(stream, here):
    """float64 Gumbel noise of tokens ``here``, from the numbers of ``counter_random.uniform``."""
    z = stream + (here + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    uniform = ((z >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit(do_not_specialize=["first_row"])
def sampling_kernel(
    logits,
    stride,
    integers,
    floats,
    streams,
    token_ids,
    probabilities,
    first_row,
    vocab,
    BITS: tl.constexpr,
    UNTEMPERED: tl.constexpr,
    ENTROPY: tl.constexpr,
    MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: [draws]. ``stride``: numbers from a row to the next; ``vocab``: V; else ``Draws``."""
    draw = tl.program_id(0)
    row = tl.load(integers + 4 * draw) - first_row
    top_k = tl.load(integers + 4 * draw + 1)
    is_noisy = tl.load(integers + 4 * draw + 2) != 0
    confidence = tl.load(integers + 4 * draw + 3)
    temperature = tl.load(floats + 3 * draw)
    log_min_p = tl.load(floats + 3 * draw + 1)
    top_p = tl.load(floats + 3 * draw + 2)
    stream = tl.load(streams + draw).to(tl.uint64, bitcast=True)
    first = logits + row.to(tl.int64) * stride
    within = tl.arange(0, BLOCK)
    never = -float("inf")

    best, most_probable = largest_of_row(first, vocab, BLOCK)
    highest = _key(best, BITS)

    # What stays has keys from the edge on. min-p: a share of the largest probability. top-k: the
    # smallest key that fewer than k are above.
    edge = _key_from(best.to(tl.float64) + temperature * log_min_p, BITS)
    if top_k > 0:
        end = highest
        while edge < end:
            middle = _between(edge, end)
            count = tl.zeros([BLOCK], tl.int32)
            for start in tl.range(0, vocab, BLOCK, num_stages=4):
                count += (_key(block_of_row(first, start + within, vocab), BITS) > middle).to(
                    tl.int32
                )
            if tl.sum(count, axis=0) < top_k:
                end = middle
            else:
                edge = middle + 1
    # top-p moves the edge on, to the smallest key that less than its share is above; and of the
    # tokens at the edge it leaves as many as begin below the share.
    num_equal = vocab
    if top_p < 1.0:
        total = tl.zeros([BLOCK], tl.float64)
        for start in tl.range(0, vocab, BLOCK, num_stages=4):
            x = block_of_row(first, start + within, vocab)
            total += _weights(x, best, temperature, _key(x, BITS) >= edge)
        share = top_p * tl.sum(total, axis=0)
        end = highest
        above_end = tl.zeros([], tl.float64)
        while edge < end:
            middle = _between(edge, end)
            above = tl.zeros([BLOCK], tl.float64)
            for start in tl.range(0, vocab, BLOCK, num_stages=4):
                x = block_of_row(first, start + within, vocab)
                above += _weights(x, best, temperature, _key(x, BITS) > middle)
            above_middle = tl.sum(above, axis=0)
            if above_middle < share:
                end = middle
                above_end = above_middle
            else:
                edge = middle + 1
        at_edge = tl.zeros([BLOCK], tl.float64)
        for start in tl.range(0, vocab, BLOCK, num_stages=4):
            x = block_of_row(first, start + within, vocab)
            at_edge = tl.maximum(at_edge, _weights(x, best, temperature, _key(x, BITS) == edge))
        each = tl.max(at_edge, axis=0)
        if each > 0.0:
            num_equal = tl.minimum(tl.ceil((share - above_end) / each), vocab).to(tl.int32)

    drawn = tl.full([BLOCK], never, tl.float64)
    place = within
    of_all = tl.zeros([BLOCK], tl.float64)
    of_kept = tl.zeros([BLOCK], tl.float64)
    second = tl.full([BLOCK], never, tl.float32)
    num_before = 0
    for start in tl.range(0, vocab, BLOCK):
        here = start + within
        x = block_of_row(first, here, vocab)
        kept, num_before = _kept(x, edge, num_equal, num_before, BITS)
        of_all += tl.exp(x - best).to(tl.float64)
        of_kept += _weights(x, best, temperature, kept)
        second = tl.maximum(second, tl.where(kept & (here != most_probable), x, never))
        value = x.to(tl.float64) / temperature
        if is_noisy:
            value += _noise(stream, here)
        larger = kept & (value > drawn)
        drawn = tl.where(larger, value, drawn)
        place = tl.where(larger, here, place)
    winner = tl.max(drawn, axis=0)
    token_id = tl.min(tl.where(drawn == winner, place, vocab - 1), axis=0)
    chosen = tl.load(first + token_id).to(tl.float32)
    sum_of_all = tl.sum(of_all, axis=0)
    sum_of_kept = tl.sum(of_kept, axis=0)

    if confidence == UNTEMPERED:
        result = tl.exp(chosen - best).to(tl.float64) / sum_of_all
    elif confidence == MARGIN:
        result = (1.0 - _weights(tl.max(second, axis=0), best, temperature, True)) / sum_of_kept
    elif confidence == ENTROPY:
        negative = tl.zeros([BLOCK], tl.float64)
        num_before = 0
        for start in tl.range(0, vocab, BLOCK, num_stages=4):
            x = block_of_row(first, start + within, vocab)
            kept, num_before = _kept(x, edge, num_equal, num_before, BITS)
            p = _weights(x, best, temperature, kept) / sum_of_kept
            negative += p * tl.log(p + 1e-10)
        result = tl.sum(negative, axis=0)
    else:
        result = _weights(chosen, best, temperature, True) / sum_of_kept
    # A NaN among the logits is passed over wherever numbers are compared, and reaches this sum.
    result = tl.where(sum_of_all == sum_of_all, result, sum_of_all)
    tl.store(token_ids + row, token_id.to(tl.int64))
    tl.store(probabilities + row, result)
