# SPDX-License-Identifier: Apache-2.0
"""LLaDA's two options against early ends, on five rows over five tokens.

From the description of LLaDA's generation code:

* ``logits_eos_inf``: the logit of the end of text (EOS) is -inf before the prediction is taken, so
  it is never predicted and has no probability.
* ``confidence_eos_eot_inf``: after the prediction is taken, and before the softmax that the
  confidence is read from, the logits of the end of text and of the end of turn (EoT) are -inf. So
  a predicted end has confidence 0, and everyone else's confidence is a share of what the others
  have among themselves.

A row is given by its odds: logit = ln(odds), probability = odds / sum of odds.
"""

from __future__ import annotations

A, B, EOS, EOT, C = range(5)

ODDS: list[list[float]] = [
    # A, B, EOS, EoT, C
    [6, 1, 2, 1, 2],  # of 12
    [3, 1, 5, 2, 1],  # of 12, ends
    [2, 1, 1, 4, 2],  # of 10, ends its turn
    [1, 2, 6, 3, 1],  # of 13, both kinds of ends before all else
    [1, 7, 3, 2, 2],  # of 15
]

# (logits_eos_inf, confidence_eos_eot_inf) -> (prediction, confidence) of each row.
CANDIDATES: dict[tuple[bool, bool], list[tuple[int, float]]] = {
    (False, False): [(A, 6 / 12), (EOS, 5 / 12), (EOT, 4 / 10), (EOS, 6 / 13), (B, 7 / 15)],
    # Without EOS the odds add up to 10, 7, 9, 7, 12.
    (True, False): [(A, 6 / 10), (A, 3 / 7), (EOT, 4 / 9), (EOT, 3 / 7), (B, 7 / 12)],
    # Predictions as in the first line; without EOS and EoT the odds add up to 9, 5, 5, 4, 10.
    (False, True): [(A, 6 / 9), (EOS, 0.0), (EOT, 0.0), (EOS, 0.0), (B, 7 / 10)],
    # Predictions as in the second line, odds as in the third.
    (True, True): [(A, 6 / 9), (A, 3 / 5), (EOT, 0.0), (EOT, 0.0), (B, 7 / 10)],
}

# (row, token that was sampled, its confidence with confidence_eos_eot_inf). At a temperature the
# noise decides the token, and the confidence is still read from the logits without it.
SAMPLED: list[tuple[int, int, float]] = [
    (0, C, 2 / 9),
    (0, EOS, 0.0),
    (1, B, 1 / 5),
    (2, EOT, 0.0),
    (3, A, 1 / 4),
    (4, EOT, 0.0),
]

# (logits_eos_inf, confidence_eos_eot_inf, threshold, tokens_per_step) -> rows committed.
COMMITS: list[tuple[bool, bool, float, int | None, list[int]]] = [
    # 0.50, 0.42, 0.40, 0.46, 0.47: none reaches 0.6. By rank 0, 4, 3.
    (False, False, 0.6, None, [0]),
    (False, False, 0.6, 3, [0, 3, 4]),
    # 0.60, 0.43, 0.44, 0.43, 0.58: row 0 has 0.6; by rank 0, 4, 2.
    (True, False, 0.55, None, [0, 4]),
    (True, False, 0.55, 3, [0, 2, 4]),
    # 0.67, 0, 0, 0, 0.70: renormalised, two reach 0.6. By rank 4, 0, then the first of equals.
    (False, True, 0.6, None, [0, 4]),
    (False, True, 0.0, None, [0, 4]),
    (False, True, 0.6, 3, [0, 1, 4]),
    # 0.67, 0.60, 0, 0, 0.70.
    (True, True, 0.55, None, [0, 1, 4]),
    (True, True, 0.65, None, [0, 4]),
]
