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

    A probability of 0 (``confidence_eos_eot_inf``: a predicted end) reaches no threshold, not even
    0: it is committed only where the step has nothing else, and then one is, the earliest, since
    all of them would be guesses. By rank such predictions fill up the number, as they do in
    LLaDA's own code, which always commits a fixed number and leaves the order of equals open.

    Args:
        probabilities: float64 [W], max probability of each window position, W >= 1.
    """
    if tokens_per_step is None:
        bar = min(threshold, float(probabilities.max()))
        reached = np.flatnonzero((probabilities >= bar) & (probabilities > 0))
        if len(reached):
            return reached
        tokens_per_step = 1
    ranked = np.argsort(-probabilities, kind="stable")
    return np.sort(ranked[:tokens_per_step])
