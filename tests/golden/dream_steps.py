# SPDX-License-Identifier: Apache-2.0
"""Dream's own sampler (``diffusion_generate``), from the description of its generation code.

Time falls from 1 to 0.001 in S equal steps. In a step from t to s, M masks being left,

* ``origin`` commits each of them with the chance 1 - s / t;
* the others commit int(M (1 - s / t)) of them, the most confident ones;
* the last step commits all.

With t = 1 - 0.999 i / S the number is int(M / (S / 0.999 - i)) in step i = 0, 1, ...

A confidence is read from the distribution p that the token is chosen from: at temperature 0 the
model's; else p^(1 / temperature), renormalised, less what top_p leaves out, renormalised again.

* ``maskgit_plus``: p of the token chosen.
* ``topk_margin``: the largest p less the second.
* ``entropy``: the sum of p ln p, so that the least uncertain is the largest.
"""

from __future__ import annotations

# (masks, steps, commits of each step)
SHARES: list[tuple[int, int, list[int]]] = [
    # 4 / 4.004 = 0.999, 4 / 3.004 = 1.33, 3 / 2.004 = 1.50, then the 2 that are left.
    (4, 4, [0, 1, 1, 2]),
    # 8 / 4.004 = 1.998, 7 / 3.004 = 2.33, 5 / 2.004 = 2.495.
    (8, 4, [1, 2, 2, 3]),
    # 16 / 4.004 = 3.996, 13 / 3.004 = 4.33, 9 / 2.004 = 4.49.
    (16, 4, [3, 4, 4, 5]),
    # 6 / 2.002 = 2.997.
    (6, 2, [2, 4]),
    (5, 1, [5]),
    # 3 / 5.005 = 0.60, 3 / 4.005 = 0.75, 3 / 3.005 = 0.998, 3 / 2.005 = 1.50.
    (3, 5, [0, 0, 0, 1, 2]),
]

# A row is given by its odds, of 100: logit = ln(odds).
ODDS: list[list[int]] = [[60, 20, 20], [55, 44, 1], [45, 28, 27], [50, 49, 1]]

# Confidence of each row at temperature 0, where token 0 is chosen in all.
CONFIDENCES: dict[str, list[float]] = {
    "maskgit_plus": [0.60, 0.55, 0.45, 0.50],
    "topk_margin": [0.40, 0.11, 0.17, 0.01],
    "entropy": [-0.950271, -0.736093, -1.069279, -0.742167],
}

# Rows committed in each step where these four are masked, the confidences being the same at every
# step: none, one, one and the two that are left.
DECODED: dict[str, list[list[int]]] = {
    "maskgit_plus": [[], [0], [1], [2, 3]],
    "topk_margin": [[], [0], [2], [1, 3]],
    "entropy": [[], [1], [3], [0, 2]],
}

# Temperature 0.5 squares the odds.
# (row, top_p, alg, token that is chosen -> confidence)
SAMPLED: list[tuple[int, float, str, dict[int, float]]] = [
    # 3600, 400, 400 of 4400: the first alone has more than 0.8.
    (0, 0.8, "maskgit_plus", {0: 1.0}),
    (0, 0.8, "topk_margin", {0: 1.0}),
    (0, 0.8, "entropy", {0: 0.0}),
    # 3025, 1936, 1 of 4962: the first two are kept, 3025 and 1936 of 4961.
    (1, 0.8, "maskgit_plus", {0: 0.609756, 1: 0.390244}),
    (1, 0.8, "topk_margin", {0: 0.219512, 1: 0.219512}),
    (1, 0.8, "entropy", {0: -0.668857, 1: -0.668857}),
    # 2025, 784, 729 of 3538.
    (2, 1.0, "maskgit_plus", {0: 0.572357, 1: 0.221594, 2: 0.206049}),
    (2, 1.0, "topk_margin", {0: 0.350763, 1: 0.350763, 2: 0.350763}),
]
