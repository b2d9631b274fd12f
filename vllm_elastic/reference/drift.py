# SPDX-License-Identifier: Apache-2.0
"""The two similarities of attention rows before and after an update.

Both take (H, R, T): H heads, R tracked positions, T keys, probabilities in float32, and return
a number in 0..1 up to rounding, 1 for no drift. Norms are clamped at 1e-8.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Statistic = Literal["released", "paper"]


def cosine(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Cosine of a and b along ``dim``, each norm at least 1e-8."""
    norm_a = a.square().sum(dim=dim).sqrt().clamp(min=1e-8)
    norm_b = b.square().sum(dim=dim).sqrt().clamp(min=1e-8)
    return (a * b).sum(dim=dim) / (norm_a * norm_b)


def similarity(before: Tensor, after: Tensor, statistic: Statistic) -> float:
    """How alike the tracked positions' attention is, (H, R, T) each.

    "released": what the released code computes. For each tracked position and each key, cosine
    across the heads; mean over all tracked positions and all T keys.
    "paper": for each head and each tracked position, cosine of the attention rows across the
    keys; mean over heads and tracked positions.
    """
    across = {"released": 0, "paper": 2}[statistic]
    return float(cosine(before, after, dim=across).mean())
