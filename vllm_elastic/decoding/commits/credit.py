# SPDX-License-Identifier: Apache-2.0
"""A token that is predicted again and again needs less probability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.commits.threshold import Threshold
from vllm_elastic.decoding.predictions import Predictions

POWER = 0.2
"""The power of a probability in the credit that it earns; dInfer's ``boost_gamma``."""


class Credit(Threshold):
    """At least ``threshold``, when each prediction's odds are multiplied by what its token earned.

    CreditDecoding (arXiv 2510.06133), with the form and the constants of its authors' dInfer. At
    each step a position's credits are multiplied by ``credit_decay`` and the token that is
    predicted there earns its probability to the power ``POWER``; ``credit_weight`` times
    log(1 + credit) is added to the token's logit before the softmax.

    Here to the predicted token's alone. In theirs a token that was predicted before keeps its
    bonus beside the present one, and may win by it (docs/commit-rules.md).
    """

    name = "credit"

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self._holders: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)  # see _holders_of
        self._credits: npt.NDArray[np.float64] = np.empty(0)

    def weighed(self, predictions: Predictions) -> Predictions:
        probabilities = predictions.probabilities
        bonus = (1 + self._earned(predictions)) ** self.config.credit_weight
        odds = probabilities * bonus
        return replace(predictions, probabilities=odds / (1 - probabilities + odds))

    def _earned(self, predictions: Predictions) -> npt.NDArray[np.float64]:
        """float64 [W]: the credit of each predicted token, this step's among it."""
        holders = _holders_of(predictions)
        known = np.isin(self._holders >> 32, predictions.positions)  # still masked
        before, credits = self._holders[known], self._credits[known] * self.config.credit_decay
        earned = predictions.probabilities**POWER
        self._holders, index = np.unique(np.append(before, holders), return_inverse=True)
        self._credits = np.zeros(len(self._holders))
        np.add.at(self._credits, index, np.append(credits, earned))
        return self._credits[index[len(before) :]]


def _holders_of(predictions: Predictions) -> npt.NDArray[np.int64]:
    """int64 [W]: position and token as one number."""
    return (predictions.positions.astype(np.int64) << 32) | predictions.token_ids
