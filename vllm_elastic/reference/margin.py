# SPDX-License-Identifier: Apache-2.0
"""How near a decision was to falling the other way.

Two right implementations in float32 round differently. Where a decision's margin is of the order
of that rounding (1e-5 and less), they may part for good; where it is larger, one of them is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .commit import NO_EVIDENCE, CommitOptions, Evidence, near_anchors, rooms, sure


def on_cpu(values: Tensor | Sequence[float]) -> Tensor:
    """(n,) float64 values, wherever they were."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


def of_ranking(values: Tensor | Sequence[float], count: int) -> float:
    """Of taking the ``count`` largest of (n,) values: the gap to the next, as a share of it all.

    Infinite if nothing, or nothing finite, is left out, or if the last taken is 0 and so is the
    next: such zeros are exact, and their order is not the rounding's.
    """
    ranked = on_cpu(values).sort(descending=True).values
    if not 0 < count < len(ranked) or not torch.isfinite(ranked[count]):
        return math.inf
    last, next_ = ranked[count - 1].item(), ranked[count].item()
    if last == next_ == 0:
        return math.inf
    return (last - next_) / max(abs(last), 1e-30)


def of_threshold(values: Tensor | Sequence[float], threshold: float) -> float:
    """Of telling (n,) values from ``threshold`` on from those below: the nearest one's distance."""
    return (on_cpu(values) - threshold).abs().min().item() if len(values) else math.inf


def of_sure(
    confidence: Tensor,
    positions: Tensor,
    options: CommitOptions,
    evidence: Evidence = NO_EVIDENCE,
) -> float:
    """Of ``commit.sure``: n tokens that are judged together share the distance from the bound."""
    if options.commit in ("threshold", "credit"):
        return of_threshold(confidence, options.threshold)
    if options.commit in ("frontier", "steady"):
        lasting = confidence[:0] if evidence.lasting is None else evidence.lasting
        return min(
            of_threshold(confidence, options.threshold),
            of_threshold(confidence[:1], options.frontier_threshold),
            of_threshold(lasting[lasting > 0], options.steady_threshold),
        )
    if options.commit == "local":
        near = near_anchors(confidence, positions, options)
        return min(
            of_threshold(confidence, options.threshold),
            of_threshold(confidence[near], options.relaxed_threshold),
        )
    distances = rooms(confidence, options, evidence.entropy)
    count = int(sure(confidence, positions, options, evidence).sum())
    return min(
        of_ranking(confidence, count),
        *(abs(room) / (n + 1) for n, room in enumerate(distances, start=1)),
    )


def of_commit(
    confidence: Tensor,
    positions: Tensor,
    options: CommitOptions,
    evidence: Evidence = NO_EVIDENCE,
) -> float:
    """Of ``commit.choose``."""
    if options.tokens_per_step is not None:
        return of_ranking(confidence, options.tokens_per_step)
    of_rule = of_sure(confidence, positions, options, evidence)
    if sure(confidence, positions, options, evidence).any():
        return of_rule
    if options.commit in ("threshold", "credit"):
        # The best is committed on either side of the threshold.
        return of_ranking(confidence, 1)
    return min(of_ranking(confidence, 1), of_rule)


def of_candidates(logits: Tensor) -> float:
    """Of taking the largest of each row of (R, vocabulary): the nearest second, in logits."""
    best, second = logits.double().topk(2, dim=-1).values.unbind(-1)
    return (best - second).min().item()
