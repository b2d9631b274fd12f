# SPDX-License-Identifier: Apache-2.0
"""What a denoising step predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions


@dataclass(frozen=True, slots=True)
class Predictions:
    """A token for each of W positions, and how sure the model is of it.

    Attributes:
        positions: masked ones, ascending, W >= 1.
        token_ids: int32 [W].
        probabilities: float64 [W], or confidences as ``Sampling.alg`` has them.
        entropies: float64 [W], of the distributions, in nats; None: not asked for.
    """

    positions: Positions
    token_ids: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    entropies: npt.NDArray[np.float64] | None = None
