# SPDX-License-Identifier: Apache-2.0
"""Which predictions of a step are committed.

By threshold (Elastic-Cache): those with at least ``min(threshold, best)``, so the best always.
By rank (LLaDA): a fixed number, the most confident; equals to the smaller position.
A confidence of 0, which LLaDA's ``confidence_eos_eot_inf`` gives to ends, reaches no threshold: it
is committed only where a step has nothing else, and then one. By rank it fills up the number.
"""

from __future__ import annotations

# (confidences, threshold, tokens_per_step or None, indices committed)
COMMITS: list[tuple[list[float], float, int | None, list[int]]] = [
    # By threshold: all that reach it, equal to it included.
    ([0.5, 0.3, 0.9, 0.6], 0.0, None, [0, 1, 2, 3]),
    ([0.5, 0.3, 0.9, 0.6], 0.5, None, [0, 2, 3]),
    ([0.5, 0.3, 0.9, 0.6], 0.9, None, [2]),
    ([0.5, 0.75, 1.0], 0.75, None, [1, 2]),
    ([1.0, 0.999999, 1.0], 1.0, None, [0, 2]),
    # None reaches it: the best, and those equal to it.
    ([0.5, 0.3, 0.9, 0.6], 0.95, None, [2]),
    ([0.2, 0.7, 0.7], 0.9, None, [1, 2]),
    ([1e-300], 0.9, None, [0]),
    ([0.25, 0.5], 1.5, None, [1]),
    # By rank, whatever the threshold; equals go to the smaller position.
    ([0.5, 0.3, 0.9, 0.6], 0.0, 1, [2]),
    ([0.5, 0.3, 0.9, 0.6], 0.95, 2, [2, 3]),
    ([0.5, 0.3, 0.9, 0.6], 0.95, 3, [0, 2, 3]),
    ([0.2, 0.7, 0.7, 0.7], 0.9, 2, [1, 2]),
    ([0.7, 0.2, 0.7, 0.2, 0.2], 0.9, 4, [0, 1, 2, 3]),
    ([0.5, 0.3], 0.9, 7, [0, 1]),
    # Confidence 0.
    ([0.0, 0.4, 0.0], 0.9, None, [1]),
    ([0.0, 0.4, 0.0], 0.0, None, [1]),
    ([0.0, 0.0, 0.0], 0.9, None, [0]),
    ([0.0, 0.0], 0.0, None, [0]),
    ([0.0, 0.4, 0.0, 0.1], 0.9, 3, [0, 1, 3]),
]
