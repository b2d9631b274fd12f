# SPDX-License-Identifier: Apache-2.0
"""Flags of several canvases as one array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def filled_up(rows: Sequence[npt.NDArray[np.bool_]], length: int) -> npt.NDArray[np.bool_]:
    """bool [rows, length]: rows of their own lengths, filled up with False."""
    flags = np.zeros((len(rows), length), dtype=np.bool_)
    for target, row in zip(flags, rows, strict=True):
        target[: len(row)] = row
    return flags
