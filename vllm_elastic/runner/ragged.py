# SPDX-License-Identifier: Apache-2.0
"""Rows in parts, or of their own lengths, as one array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def bounds(lengths: Iterable[int]) -> list[int]:
    """Where each of N parts begins, one behind the other, and where the last one ends."""
    return list(accumulate(lengths, initial=0))


def filled_up(rows: Sequence[Any], length: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """[rows, length] of a type: each row from the left, filled up with 0 (False)."""
    filled = np.zeros((len(rows), length), dtype=dtype)
    for target, row in zip(filled, rows, strict=True):
        target[: len(row)] = row
    return filled


def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Parts one behind the other; no operator where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
