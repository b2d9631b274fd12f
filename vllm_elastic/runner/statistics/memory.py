# SPDX-License-Identifier: Apache-2.0
"""What logits and measurements take at most: the trial run allocates it, ``bench plan`` adds it.

Imports no torch.
"""

from __future__ import annotations

MOST_NUMBERS_AT_ONCE = 1 << 26
"""Numbers of 4 bytes that are at hand at a time: what the kernels write (on CPUs: attention rows of
one plan, which are cut into tiles of no more), hidden states of probes."""

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time, and numbers of 8 bytes made of them: however wide the windows are
and however many requests share a pass, the head takes no more memory than for this many."""

SUMS_AT_ONCE = 1 << 24
"""Sums of drift tests that wait to be added up over ranks, in numbers of 4 bytes."""

_COPIES_OF_READING = 4
"""Hidden states of probes are converted, subtracted and multiplied. On a CPU there are keys, scores
and their softmax; beside them what a drift test compares and sums. The kernels make no copy."""


def saved_bytes(
    saved_rows: int, layers: int, heads: int, head_dim: int, width: int, number_bytes: int
) -> int:
    """What the recorder keeps of so many rows, in every layer.

    A row is a query, a key, or a stored input of this rank's columns; but a tested row's old input
    is all of the width, and at most every fourth row is one (``PassPlan.num_saved_rows``).

    Args:
        heads: query heads of one rank, no fewer than its KV heads.
    """
    query = heads * head_dim
    numbers = saved_rows * query + saved_rows // 4 * max(0, width - query)
    return layers * numbers * number_bytes


def totals_bytes(max_num_seqs: int, canvas: int, layers: int) -> int:
    """The attention that each position of so many canvases is paid in each layer, in float32."""
    return 4 * max_num_seqs * canvas * layers


def reading_bytes(canvas: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """What working out attention holds at its peak, in float32, however wide a window is.

    The least is a layer's keys of one canvas, or the attention of one row before and after.
    """
    one_layer = canvas * max(kv_heads * head_dim, 2 * heads)
    return 4 * _COPIES_OF_READING * max(MOST_NUMBERS_AT_ONCE, one_layer)
