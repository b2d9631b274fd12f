# SPDX-License-Identifier: Apache-2.0
"""Which of a step's predictions are committed (arXiv 2510.14973: parallel decoding)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def choose_commits(
    probabilities: npt.NDArray[np.float64], threshold: float, tokens_per_step: int | None
) -> npt.NDArray[np.intp]:
    """Indices into the window that are committed in this step, ascending, at least one.

    By threshold: every prediction with probability >= min(threshold, best of the window), so the
    best is always among them. By rank (``tokens_per_step``): the k most probable; ties go to
    the smaller position.

    Args:
        probabilities: float64 [W], max probability of each window position, W >= 1.
    """
    if tokens_per_step is None:
        return np.flatnonzero(probabilities >= min(threshold, float(probabilities.max())))
    ranked = np.argsort(-probabilities, kind="stable")
    return np.sort(ranked[:tokens_per_step])
