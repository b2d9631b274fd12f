# SPDX-License-Identifier: Apache-2.0
"""A prediction and its probability for each window row."""

from __future__ import annotations

import torch


def candidates(logits: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token and its probability, temperature 0.

    The softmax is in float64, as in the released code: the threshold is compared with it. The
    mask itself is no candidate: committing it would leave the position undecided for ever.

    Args:
        logits: [W, V]; changed in place.

    Returns:
        int64 [W] and float64 [W]; a row with a NaN has probability NaN.
    """
    logits[:, mask_token_id] = float("-inf")
    best, token_ids = logits.max(dim=-1)
    total = torch.exp(logits.double() - best.double()[:, None]).sum(dim=-1)
    return token_ids, 1.0 / total
