# SPDX-License-Identifier: Apache-2.0
"""Which predictions of a step are committed together, by each rule's published formula.

With c_1 >= c_2 >= ... the confidences in falling order:

* frontier: a confidence reaches the threshold, or, of the leftmost position, the lower one.
* steady: as frontier, or the step before predicted the same token there, and both confidences reach
  the threshold for that.
* credit (CreditDecoding, of the predicted token alone): the odds c / (1 - c) times
  (1 + credit) ** weight reach those of the threshold. A token's credit at a position falls to
  ``decay`` of it at each step, and grows by c ** 0.2 when it is predicted there.
* factor (Fast-dLLM): the first n, for the largest n with (n + 1)(1 - c_n) < factor.
* frechet (Fast-dLLM++): the first n, for the largest n with
  max(0, c_1 + ... + c_n - (n - 1)) - (1 - c_n) > margin.
* local (LocalLeap): an anchor reaches the threshold; what lies within the radius of an anchor is
  committed from the relaxed threshold on.
* entropy (EB-Sampler, in the order of confidence): the first n, for the largest n whose entropies
  without the largest of them add up to the bound or less; one alone if its own does.

Where nothing qualifies the best is committed. A confidence of 0 qualifies nowhere.
"""

from __future__ import annotations

from typing import Any

PROFILE = [0.82, 0.99, 0.74, 0.95, 0.78]
NEIGHBOURS = [10, 11, 12, 15, 16, 17]
CONFIDENCES = [0.80, 0.95, 0.70, 0.76, 0.80, 0.60]

# (settings, positions of the window, confidences, indices committed)
COMMITS: list[tuple[dict[str, Any], list[int], list[float], list[int]]] = [
    # The first reaches the lower threshold only, the third and the last neither of their own.
    ({"commit": "frontier"}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 3]),
    ({"commit": "frontier", "frontier_threshold": 0.83}, [3, 4, 5, 6, 7], PROFILE, [1, 3]),
    ({"commit": "frontier", "threshold": 0.7}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 2, 3, 4]),
    # The first position of a window with holes; a higher frontier takes nothing away.
    ({"commit": "frontier"}, [3, 9, 10], [0.5, 0.8, 0.7], [0]),
    ({"commit": "frontier", "frontier_threshold": 1.0}, [3, 9, 10], [0.95, 0.8, 0.7], [0]),
    # Nothing qualifies: the best, wherever it is.
    ({"commit": "frontier"}, [3, 4, 5], [0.4, 0.7, 0.8], [2]),
    ({"commit": "frontier", "frontier_threshold": 0.0}, [3, 4], [0.0, 0.5], [1]),
    # 2 * 0.01 = 0.02, 3 * 0.05 = 0.15, 4 * 0.18 = 0.72, 5 * 0.22 = 1.10, 6 * 0.26 = 1.56.
    ({"commit": "factor", "factor": 0.01}, [3, 4, 5, 6, 7], PROFILE, [1]),
    ({"commit": "factor", "factor": 0.1}, [3, 4, 5, 6, 7], PROFILE, [1]),
    ({"commit": "factor", "factor": 0.5}, [3, 4, 5, 6, 7], PROFILE, [1, 3]),
    ({"commit": "factor", "factor": 0.75}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 3]),
    ({"commit": "factor", "factor": 1.2}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 3, 4]),
    ({"commit": "factor", "factor": 2.0}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 2, 3, 4]),
    # 2 * 0.125 = 0.25, 3 * 0.25 = 0.75: below the factor, not equal to it.
    ({"commit": "factor", "factor": 0.75}, [5, 6], [0.75, 0.875], [1]),
    ({"commit": "factor", "factor": 0.8}, [5, 6], [0.75, 0.875], [0, 1]),
    # 0.4, 0.6, 0.8: equals go to the smaller position.
    ({"commit": "factor", "factor": 0.75}, [5, 8, 9], [0.8, 0.8, 0.8], [0, 1]),
    # 2 * 0.4 = 0.8: nothing qualifies, and the best is committed with its equal.
    ({"commit": "factor", "factor": 0.75}, [5, 6, 7], [0.3, 0.6, 0.5], [1]),
    ({"commit": "factor", "factor": 0.75}, [5, 6, 7], [0.6, 0.3, 0.6], [0, 2]),
    ({"commit": "factor", "factor": 10.0}, [5, 6, 7], [0.0, 0.4, 0.0], [1]),
    ({"commit": "factor", "factor": 10.0}, [5, 6, 7], [0.0, 0.0, 0.0], [0]),
    # 0.99 - 0.01 = 0.98, 0.94 - 0.05 = 0.89, 0.76 - 0.18 = 0.58, 0.54 - 0.22 = 0.32,
    # 0.28 - 0.26 = 0.02.
    ({"commit": "frechet", "frechet_margin": 0.99}, [3, 4, 5, 6, 7], PROFILE, [1]),
    ({"commit": "frechet", "frechet_margin": 0.9}, [3, 4, 5, 6, 7], PROFILE, [1]),
    ({"commit": "frechet", "frechet_margin": 0.6}, [3, 4, 5, 6, 7], PROFILE, [1, 3]),
    ({"commit": "frechet", "frechet_margin": 0.5}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 3]),
    ({"commit": "frechet", "frechet_margin": 0.25}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 3, 4]),
    ({"commit": "frechet", "frechet_margin": 0.0}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 2, 3, 4]),
    # 0.875 - 0.125 = 0.75, 0.625 - 0.25 = 0.375: above the margin, not equal to it.
    ({"commit": "frechet", "frechet_margin": 0.375}, [5, 6], [0.75, 0.875], [1]),
    ({"commit": "frechet", "frechet_margin": 0.25}, [5, 6], [0.75, 0.875], [0, 1]),
    # 0.6, 0.4, 0.2: equal confidences as by a factor of 1 - margin.
    ({"commit": "frechet", "frechet_margin": 0.25}, [5, 8, 9], [0.8, 0.8, 0.8], [0, 1]),
    # 0.6 - 0.4 = 0.2: nothing qualifies.
    ({"commit": "frechet", "frechet_margin": 0.25}, [5, 6], [0.5, 0.6], [1]),
    ({"commit": "frechet", "frechet_margin": 0.0}, [5, 6], [0.0, 1.0], [1]),
    ({"commit": "frechet", "frechet_margin": 0.0}, [5, 6], [0.0, 0.0], [0]),
    # The anchor is 11: 10 and 15 are near and sure enough, 12 is near, 16 is sure enough and
    # near 15, which is no anchor.
    ({"commit": "local"}, NEIGHBOURS, CONFIDENCES, [0, 1, 3]),
    ({"commit": "local", "anchor_radius": 5}, NEIGHBOURS, CONFIDENCES, [0, 1, 3, 4]),
    ({"commit": "local", "anchor_radius": 3}, NEIGHBOURS, CONFIDENCES, [0, 1]),
    ({"commit": "local", "anchor_radius": 0}, NEIGHBOURS, CONFIDENCES, [1]),
    ({"commit": "local", "relaxed_threshold": 0.7}, NEIGHBOURS, CONFIDENCES, [0, 1, 2, 3]),
    ({"commit": "local", "relaxed_threshold": 0.99}, NEIGHBOURS, CONFIDENCES, [1]),
    # Two anchors, 11 and 16, which is near 15 and 17 only.
    (
        {"commit": "local", "threshold": 0.8, "relaxed_threshold": 0.6, "anchor_radius": 1},
        NEIGHBOURS,
        [0.65, 0.95, 0.59, 0.60, 0.80, 0.75],
        [0, 1, 3, 4, 5],
    ),
    # Near in the window is not near in the canvas.
    ({"commit": "local"}, [10, 11, 20, 21], [0.8, 0.95, 0.8, 0.8], [0, 1]),
    # No anchor: the best, with its equal.
    ({"commit": "local"}, [5, 6, 7], [0.8, 0.89, 0.89], [1, 2]),
    ({"commit": "local", "relaxed_threshold": 0.0}, [5, 6, 7], [0.0, 0.95, 0.01], [1, 2]),
    # By rank whatever the rule.
    ({"commit": "factor", "tokens_per_step": 2}, [3, 4, 5, 6, 7], PROFILE, [1, 3]),
    ({"commit": "frechet", "tokens_per_step": 5}, [3, 4, 5, 6, 7], PROFILE, [0, 1, 2, 3, 4]),
    ({"commit": "local", "tokens_per_step": 1}, NEIGHBOURS, CONFIDENCES, [1]),
    ({"commit": "threshold"}, NEIGHBOURS, CONFIDENCES, [1]),
]

# (bound, confidences, entropies, indices committed)
ENTROPY: list[tuple[float, list[float], list[float], list[int]]] = [
    # In the order of confidence 0.25, 0.5, 0.125, 1. One: 0.25; two: 0.75 - 0.5 = 0.25;
    # three: 0.875 - 0.5 = 0.375; four: 1.875 - 1 = 0.875.
    (0.125, [0.7, 0.9, 0.5, 0.8], [0.125, 0.25, 1.0, 0.5], [1]),
    (0.25, [0.7, 0.9, 0.5, 0.8], [0.125, 0.25, 1.0, 0.5], [1, 3]),
    (0.374, [0.7, 0.9, 0.5, 0.8], [0.125, 0.25, 1.0, 0.5], [1, 3]),
    (0.375, [0.7, 0.9, 0.5, 0.8], [0.125, 0.25, 1.0, 0.5], [0, 1, 3]),
    (0.875, [0.7, 0.9, 0.5, 0.8], [0.125, 0.25, 1.0, 0.5], [0, 1, 2, 3]),
    (0.0, [0.7, 1.0, 0.5, 1.0], [0.125, 0.0, 1.0, 0.0], [0, 1, 3]),
    # One: 0.5; two: 0.75 - 0.5 = 0.25. The largest n counts, not the first that is too much.
    (0.3, [0.9, 0.8], [0.5, 0.25], [0, 1]),
    # Nothing qualifies: the best with its equal.
    (0.1, [0.6, 0.2, 0.6], [0.5, 0.75, 0.5], [0, 2]),
    (9.0, [0.0, 0.4, 0.0], [0.5, 0.5, 0.5], [1]),
    (9.0, [0.0, 0.0], [0.5, 0.5], [0]),
]

# Of `steady`: (settings, steps: positions predicted, tokens, confidences, indices committed)
STEADY: list[tuple[dict[str, Any], list[tuple[list[int], list[int], list[float], list[int]]]]] = [
    (
        {},
        [
            # The first position reaches the frontier's threshold, 6 its own; nothing was before.
            ([3, 4, 5, 6, 7], [1, 2, 3, 4, 5], [0.5, 0.85, 0.8, 0.95, 0.79], [0, 3]),
            # 4 says the same again, 5 another token, 7 was not sure enough, 8 is new; 4 is the
            # frontier as well.
            ([4, 5, 7, 8], [2, 9, 5, 6], [0.8, 0.85, 0.85, 0.85], [0]),
            # 5 and 7 last from the step before; 8 has sunk.
            ([5, 7, 8, 9], [9, 5, 6, 7], [0.4, 0.89, 0.7, 0.85], [1]),
            # 8 was unsure a step ago, however sure it was two ago; 9 lasts.
            ([5, 8, 9], [9, 6, 7], [0.3, 0.85, 0.81], [2]),
            # Nothing: the best.
            ([5, 8], [9, 5], [0.3, 0.85], [1]),
        ],
    ),
    (
        {"steady_threshold": 0.3, "frontier_threshold": 0.6},
        [
            ([3, 4, 5], [1, 2, 3], [0.4, 0.3, 0.2], [0]),  # the best
            ([4, 5, 6], [2, 3, 8], [0.3, 0.9, 0.8], [0, 1]),
        ],
    ),
    # As sure as `threshold` in any case: a higher one takes nothing away.
    (
        {"steady_threshold": 1.0},
        [([3, 4], [1, 2], [0.4, 0.85], [1]), ([3, 5], [1, 2], [0.49, 0.9], [1])],
    ),
    # A confidence of 0 is a guess, however often it is made.
    (
        {"steady_threshold": 0.0, "frontier_threshold": 0.0},
        [([3, 4], [1, 2], [0.0, 0.0], [0]), ([4, 5], [2, 2], [0.0, 0.0], [0])],
    ),
]

# Of `credit`, as above; 0.8 ** 5 = 0.32768, 0.9 ** 5 = 0.59049.
CREDIT: list[tuple[dict[str, Any], list[tuple[list[int], list[int], list[float], list[int]]]]] = [
    (
        {"credit_decay": 0.5, "credit_weight": 1.0, "threshold": 0.51},
        [
            # Odds 1.4419 * 1.9 = 2.740: 0.733. 0.4874 * 1.8 = 0.877: 0.467, and so does the third.
            ([3, 4, 5], [1, 2, 3], [0.59049, 0.32768, 0.32768], [0]),
            # Credit 0.4 + 0.8 = 1.2, odds 0.4874 * 2.2 = 1.072: 0.517. Of another token 0.467.
            ([4, 5, 6], [2, 7, 8], [0.32768, 0.32768, 0.01], [0]),
            # The first token again, 0.8 / 4 + 0.8 = 1, 0.4874 * 2 = 0.975: 0.494, and the best.
            ([5, 6], [3, 8], [0.32768, 0.01], [0]),
            ([6, 7], [8, 8], [0.0, 0.0], [0]),
        ],
    ),
    # The same with more of what was: 0.4874 * (1 + 0.9 * 0.9 * 0.8 + 0.8) = 1.193: 0.544.
    (
        {"credit_decay": 0.9, "credit_weight": 1.0, "threshold": 0.54},
        [
            ([5, 6], [3, 8], [0.32768, 0.6], [1]),
            ([5, 7], [7, 8], [0.32768, 0.6], [1]),
            ([5, 8], [3, 8], [0.32768, 0.32768], [0]),
        ],
    ),
    # Nothing is sure: the best with its credit, which is not the one with the higher probability.
    (
        {"credit_decay": 0.5, "credit_weight": 2.0, "threshold": 0.99},
        [([3, 4], [1, 2], [0.35, 0.3], [0]), ([4, 5], [2, 3], [0.3, 0.34], [0])],
    ),
    # Without a weight it is `threshold`; and by rank the model's own probabilities count.
    ({"credit_weight": 0.0}, [([3, 4], [1, 2], [0.89, 0.9], [1]), ([3], [1], [0.3], [0])]),
    (
        {"tokens_per_step": 1, "credit_weight": 10.0},
        [([3, 4], [1, 2], [0.4, 0.3], [0]), ([4, 5], [2, 3], [0.3, 0.31], [1])],
    ),
]
