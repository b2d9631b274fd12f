# SPDX-License-Identifier: Apache-2.0
"""Which predictions become final in a denoising step. Temperature 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def without(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """(R, vocabulary) in float64, tokens that are no candidates at -inf; some may lie beyond."""
    excluded = [token for token in token_ids if token < logits.shape[1]]
    return logits.double().index_fill(
        1, torch.tensor(excluded, dtype=torch.int64, device=logits.device), -torch.inf
    )


def candidates(
    logits: Tensor,
    mask_token_id: int,
    never: Sequence[int] = (),
    unconfident: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The most probable token of every row and its probability.

    Softmax in float64, as Elastic-Cache's released code has it (LLaDA's has had float64 and, since,
    the logits' own dtype). One addition of ours: the mask token is no candidate (probability 0),
    since committing it would decode nothing.

    Args:
        logits: (R, vocabulary), any float dtype.
        mask_token_id: may lie beyond the vocabulary.
        never: token ids that are no candidates (LLaDA's ``logits_eos_inf``: the end of text).
        unconfident: token ids that may be predicted, and whose logits are -inf in the softmax: such
            a prediction has confidence 0, and the others have their share of what is left
            (LLaDA's ``confidence_eos_eot_inf``: the ends of text and of turn).

    Returns:
        (R,) int64 token ids, equal logits going to the smaller id; (R,) float64 confidences.
    """
    logits = without(logits, (mask_token_id, *never))
    token_ids = logits.argmax(dim=-1)
    probabilities = without(logits, unconfident).softmax(dim=-1)
    return token_ids, probabilities.gather(1, token_ids[:, None]).squeeze(1)


def at_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """(n,) bool: at least ``min(threshold, best)``, so at least one (Elastic-Cache, step 6).

    A confidence of 0 reaches no threshold. If there is no other, one is committed, the earliest:
    LLaDA's code, which commits a fixed number a step, has no rule for this case.
    """
    reached = (confidence >= min(threshold, confidence.max().item())) & (confidence > 0)
    return reached if reached.any() else most_confident(confidence, 1)


def most_confident(confidence: Tensor, count: int) -> Tensor:
    """(n,) bool: the ``count`` highest, all if there are fewer; equals go to the earlier one."""
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[confidence.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def choose(confidence: Tensor, threshold: float, tokens_per_step: int | None) -> Tensor:
    """(n,) bool, which of the window to commit: by threshold, or a fixed number a step."""
    if tokens_per_step is None:
        return at_threshold(confidence, threshold)
    return most_confident(confidence, tokens_per_step)
