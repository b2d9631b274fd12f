# SPDX-License-Identifier: Apache-2.0
"""Flags of several canvases as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


def flags_on(
    device: torch.device, rows: Sequence[npt.NDArray[np.bool_]], length: int
) -> torch.Tensor:
    """bool [rows, length] on the device: rows of their own lengths, filled up with False."""
    flags = np.zeros((len(rows), length), dtype=np.bool_)
    for target, row in zip(flags, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(flags).to(device)
