# SPDX-License-Identifier: Apache-2.0
"""Attention rows, attention mass and drift for a handful of queries, all layers at once.

Each function has its obviously right twin in ``naive.py``.
"""

from __future__ import annotations

import torch

NORM_FLOOR = 1e-8
"""Norms are clamped here before the division, as the released Elastic-Cache code does."""


def attention_scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled scores in float32.

    Args:
        queries: [..., R, Hq, D]; keys: [..., Hkv, D, T], Hq a multiple of Hkv.

    Returns:
        float32 [..., Hq, R, T].
    """
    *batch, num_rows, num_heads, dim = queries.shape
    kv_heads = keys.shape[-3]
    grouped = queries.float().unflatten(-2, (kv_heads, num_heads // kv_heads))
    grouped = grouped.movedim(-4, -2).reshape(*batch, kv_heads, -1, dim)
    scores = torch.matmul(grouped * scale, keys.float())
    return scores.view(*batch, num_heads, num_rows, -1)


def attention_mass(attention: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Attention that rows pay each position, every row weighted: [..., H, R, T] to [..., T].

    Args:
        weights: [..., R], 1 for the rows that count and 0 for the others; leading dimensions are
            broadcast to those of the attention.
    """
    # A product: torch takes ten times as long to sum over a dimension that is not the last.
    return torch.matmul(weights[..., None, None, :], attention).squeeze(-2).sum(dim=-2)


def most_attended(mass: torch.Tensor, trackable: torch.Tensor, track_num: int) -> torch.Tensor:
    """The ``track_num`` trackable positions with the largest mass, in order.

    Args:
        mass: [..., T]; trackable: bool [..., T], leading dimensions broadcast to those of the mass.

    Returns:
        int64 [..., track_num]; ties go to the smaller position; -1 where there are too few.
    """
    mass = mass.masked_fill(~trackable, -1.0)
    if track_num == 1:
        best = mass.argmax(dim=-1, keepdim=True)
    else:
        best = mass.sort(dim=-1, descending=True, stable=True).indices[..., :track_num]
    best = torch.where(mass.gather(-1, best) < 0, -1, best)
    return torch.nn.functional.pad(best, (0, track_num - best.shape[-1]), value=-1)


def drift_sums(old: torch.Tensor, new: torch.Tensor, statistic: str) -> list[torch.Tensor]:
    """The part of ``naive.drift_similarity`` that adds up over heads, of some of the heads.

    Args:
        old, new: float32 [L, H, M, T], attention rows (softmax over T) before and after an update.
        statistic: ``released``: cosine across the heads for every tested row and key, mean over
            both (the authors' code); ``paper``: cosine across the keys for every head and tested
            row, mean over both (arXiv 2510.14973).

    Returns:
        ``released``: dot products and both squared norms across the heads, each [L, M, T];
        ``paper``: the cosines summed over heads and tested rows, [L].
    """
    across = 1 if statistic == "released" else 3
    # torch's vector norm takes ten times as long where the reduced dimension is not the last.
    sums = [(a * b).sum(dim=across) for a, b in ((old, new), (old, old), (new, new))]
    if statistic == "released":
        return sums
    return [_cosines(*sums).flatten(1).sum(dim=1)]


def similarity_of_sums(sums: list[torch.Tensor], statistic: str, num_rows: int) -> torch.Tensor:
    """Similarities [L] from ``drift_sums`` of all heads, which are overwritten.

    Args:
        num_rows: attention rows that were compared, heads times tested rows (``paper`` only).
    """
    if statistic == "released":
        return _cosines(*sums).flatten(1).mean(dim=1)
    return sums[0] / num_rows


def _cosines(dot: torch.Tensor, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Dot products over both norms; the squared norms are overwritten."""
    return dot / old.sqrt_().clamp_min_(NORM_FLOOR) / new.sqrt_().clamp_min_(NORM_FLOOR)
