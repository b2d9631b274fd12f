# SPDX-License-Identifier: Apache-2.0
"""Slow twins of ``attention_statistics``: loops that follow the definitions word by word."""

from __future__ import annotations

import math

import torch


def attention_scores(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled scores, one query and one head at a time."""
    num_layers, num_rows, num_heads, _ = queries.shape
    group = num_heads // keys.shape[1]
    out = torch.empty(num_layers, num_heads, num_rows, keys.shape[-1], device=keys.device)
    for layer in range(num_layers):
        for head in range(num_heads):
            for row in range(num_rows):
                query = queries[layer, row, head].float()
                out[layer, head, row] = query @ keys[layer, head // group].float() * scale
    return out


def attention(queries: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention rows [L, H, R, T], each the softmax of its scores."""
    scores = attention_scores(queries, keys, scale)
    shares = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return shares / shares.sum(dim=-1, keepdim=True)


def attention_mass(attention: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Attention summed over heads and over the rows that count."""
    num_layers, num_heads, num_rows, num_keys = attention.shape
    mass = torch.zeros(num_layers, num_keys, device=attention.device)
    for head in range(num_heads):
        for row in range(num_rows):
            mass += weights[row] * attention[:, head, row]
    return mass


def most_attended(mass: torch.Tensor, trackable: torch.Tensor, track_num: int) -> torch.Tensor:
    """Trackable positions ranked by mass; Python's sort keeps the smaller position first."""
    rows = []
    for layer in mass.tolist():
        ranked = sorted(
            (p for p, ok in enumerate(trackable.tolist()) if ok), key=lambda p: -layer[p]
        )
        rows.append((ranked + [-1] * track_num)[:track_num])
    return torch.tensor(rows, device=mass.device)


def drift_similarity(old: torch.Tensor, new: torch.Tensor, statistic: str) -> torch.Tensor:
    """Mean cosine, one pair of vectors at a time."""

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        norm = max(math.sqrt(float(a @ a)), 1e-8) * max(math.sqrt(float(b @ b)), 1e-8)
        return float(a @ b) / norm

    num_layers, num_heads, num_rows, num_keys = old.shape
    result = []
    for layer in range(num_layers):
        a, b = old[layer], new[layer]
        if statistic == "released":
            values = [
                cosine(a[:, m, t], b[:, m, t]) for m in range(num_rows) for t in range(num_keys)
            ]
        else:
            values = [cosine(a[h, m], b[h, m]) for h in range(num_heads) for m in range(num_rows)]
        result.append(sum(values) / len(values))
    return torch.tensor(result, device=new.device)
