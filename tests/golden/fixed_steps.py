# SPDX-License-Identifier: Apache-2.0
"""LLaDA's own schedule: a fixed number of denoising steps over blocks of text.

From the description of LLaDA's generation code: the answer is cut into equal blocks, decoded left
to right; each gets an equal number of the steps. A block's masks are shared out evenly among its
steps, the first steps taking one more each until the rest of the division is used up. In a
step every mask of the canvas is predicted; with ``low_confidence`` the step's share goes to the
block's most confident masks, with ``random`` to random ones of the block. All others stay masks.
"""

from __future__ import annotations

# (masks of a block, steps of a block, tokens committed in each step)
SHARES: list[tuple[int, int, list[int]]] = [
    (32, 32, [1] * 32),
    (32, 8, [4] * 8),
    (10, 4, [3, 3, 2, 2]),
    (7, 3, [3, 2, 2]),
    (5, 2, [3, 2]),
    (11, 4, [3, 3, 3, 2]),
    (6, 1, [6]),
    (3, 5, [1, 1, 1, 0, 0]),
]

PROMPT_LENGTH = 2

# Confidence of each answer position, the same at every step. Block 2 is surer than block 1 and
# has to wait all the same.
CONFIDENCE: list[float] = [
    *[0.30, 0.55, 0.50, 0.60, 0.40],
    *[0.90, 0.85, 0.95, 0.70, 0.80],
]

# (steps, block_length, answer positions committed in each step)
LOW_CONFIDENCE: list[tuple[int, int, list[list[int]]]] = [
    # Two blocks of 5 masks, 2 steps each: 3 and 2.
    (4, 5, [[1, 2, 3], [0, 4], [5, 6, 7], [8, 9]]),
    # 3 steps each: 2, 2, 1.
    (6, 5, [[1, 3], [2, 4], [0], [5, 7], [6, 9], [8]]),
    (2, 5, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
    # One block of 10 masks, 4 steps: 3, 3, 2, 2.
    (4, 10, [[5, 6, 7], [3, 8, 9], [1, 2], [0, 4]]),
    # One block, 3 steps: 4, 3, 3.
    (3, 10, [[5, 6, 7, 9], [1, 3, 8], [0, 2, 4]]),
    # Five blocks of 2, one step each.
    (5, 2, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
]

# (steps, block_length, tokens committed in each step, the block it takes them from)
RANDOM: list[tuple[int, int, list[tuple[int, int]]]] = [
    (4, 5, [(3, 0), (2, 0), (3, 1), (2, 1)]),
    (6, 5, [(2, 0), (2, 0), (1, 0), (2, 1), (2, 1), (1, 1)]),
    (3, 10, [(4, 0), (3, 0), (3, 0)]),
]
