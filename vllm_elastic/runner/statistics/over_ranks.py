# SPDX-License-Identifier: Apache-2.0
"""What is summed over ranks, where it is."""

from __future__ import annotations

import torch

from vllm_elastic.models import ranks


def add_up(parts: list[torch.Tensor]) -> None:
    """Sum over all ranks, in place."""
    if ranks.count() > 1:
        for part, total in zip(parts, ranks.add_up(parts), strict=True):
            part.copy_(total)
