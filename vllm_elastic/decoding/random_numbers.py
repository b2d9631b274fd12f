# SPDX-License-Identifier: Apache-2.0
"""Random numbers of a schedule: a function of seed and step, the same alone and in any batch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def uniform(seed: int, step: int, count: int) -> npt.NDArray[np.float64]:
    """float64 [count] in [0, 1): Philox with the key (seed, step), one number a canvas position.

    Args:
        seed: numpy takes no negative key, vLLM does; -1 is 2^64 - 1.
    """
    # As a list, a key above 2^63 would become float64.
    key = np.array([seed % (1 << 64), step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(count)
