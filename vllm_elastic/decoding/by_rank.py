# SPDX-License-Identifier: Apache-2.0
"""Commits by rank: a fixed number a step, as LLaDA's own generation code commits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def by_rank(priorities: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.intp]:
    """Indices of the ``count`` highest, ascending; all if there are fewer.

    Equals go to the smaller index, priorities of 0 among them: they fill up the number, as in
    LLaDA's code, which always commits a fixed number and leaves the order of equals open.

    Args:
        priorities: float64 [W].
    """
    ranked = np.argsort(-priorities, kind="stable")
    return np.sort(ranked[:count])
