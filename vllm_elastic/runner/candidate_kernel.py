# SPDX-License-Identifier: Apache-2.0
"""``candidates.most_probable`` as one launch: torch takes seven, and copies of all logits.

A program has one row and looks at it twice: for the largest logit, then for the sum. What it looks
at next is on its way meanwhile (``num_stages``): programs are few, and rows long. The second
look finds the row in the GPU's L2 cache (64 rows of LLaDA-8B's in bfloat16 are 16 MB). A row is
summed in an order that depends on V alone, so its number is the same in every batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WARPS = 8


def most_probable_by_kernel(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``candidates.most_probable`` by one kernel; of equal logits it takes the first.

    Args:
        logits: [W, V], the rows' own numbers one behind the other.
    """
    num_rows, vocab = logits.shape
    assert logits.stride(1) == 1
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    probabilities = torch.empty(num_rows, dtype=torch.float64, device=logits.device)
    most_probable_kernel[(num_rows,)](
        logits, logits.stride(0), token_ids, probabilities, vocab, _BLOCK, num_warps=_WARPS
    )
    return token_ids, probabilities


@triton.jit
def block_of_row(first, here, vocab):
    """Numbers of a row as float32. What is behind it counts as -inf: it is never larger, and its
    exponential is 0."""
    return tl.load(first + here, mask=here < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def largest_of_row(first, vocab, BLOCK: tl.constexpr):
    """The largest number, and the first place of those that are equal to it."""
    within = tl.arange(0, BLOCK)
    # Of every lane the largest and its place: a later one has to be larger.
    largest = tl.full([BLOCK], -float("inf"), tl.float32)
    place = within
    for start in tl.range(0, vocab, BLOCK, num_stages=4):
        here = start + within
        x = block_of_row(first, here, vocab)
        larger = x > largest
        largest = tl.where(larger, x, largest)
        place = tl.where(larger, here, place)
    best = tl.max(largest, axis=0)
    return best, tl.min(tl.where(largest == best, place, vocab - 1), axis=0)


@triton.jit
def most_probable_kernel(logits, stride, token_ids, probabilities, vocab, BLOCK: tl.constexpr):
    """Grid: [W]. ``stride``: numbers from a row to the next; ``vocab``: V."""
    row = tl.program_id(0)
    first = logits + row.to(tl.int64) * stride
    within = tl.arange(0, BLOCK)
    best, token_id = largest_of_row(first, vocab, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, vocab, BLOCK, num_stages=4):
        x = block_of_row(first, start + within, vocab)
        total += tl.exp(x - best).to(tl.float64)
    tl.store(token_ids + row, token_id.to(tl.int64))
    # A NaN is passed over where the largest is looked for, and then reaches the sum.
    tl.store(probabilities + row, 1.0 / tl.sum(total, axis=0))
