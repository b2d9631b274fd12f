# SPDX-License-Identifier: Apache-2.0
"""Types of numbers that cross between host and device, as numpy and as torch call them."""

from __future__ import annotations

import numpy as np
import torch

TORCH_OF: dict[type[np.generic], torch.dtype] = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.float64: torch.float64,
    np.float32: torch.float32,
    np.bool_: torch.bool,
}

NUMPY_OF = {torch_type: numpy_type for numpy_type, torch_type in TORCH_OF.items()}
