# SPDX-License-Identifier: Apache-2.0
"""What measurements take at most, by sizes: the trial run allocates it, ``bench plan`` adds it.

Imports no torch.
"""

from __future__ import annotations

NUMBERS_AT_ONCE_ON_GPU = 1 << 26
"""Keys and attention rows that are at hand at a time, in numbers of 4 bytes."""


def saved_bytes(saved_rows: int, layers: int, heads: int, head_dim: int, number_bytes: int) -> int:
    """What the recorder keeps of so many rows: a query or a key of every layer.

    Args:
        heads: query heads of one rank, no fewer than its KV heads.
    """
    return saved_rows * layers * heads * head_dim * number_bytes


def reading_bytes(window: int, canvas: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """What working out attention holds at its peak: keys, scores, and their softmax, in float32.

    Of several plans and layers together no more than ``NUMBERS_AT_ONCE_ON_GPU`` numbers; of one
    plan and layer all that a window's rows and as many tested ones before and after take.
    """
    one_layer = canvas * max(kv_heads * head_dim, heads * 3 * window)
    return 3 * 4 * max(NUMBERS_AT_ONCE_ON_GPU, one_layer)
