# SPDX-License-Identifier: Apache-2.0
"""A lower threshold for what the step before said too."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.commits.frontier import Frontier
from vllm_elastic.decoding.predictions import Predictions


class Steady(Frontier):
    """What ``frontier`` commits, and what was predicted at the step before too, both times at
    least ``steady_threshold``.

    Ours. A prediction that holds while the tokens around it are committed does not wait for them
    (docs/commit-rules.md has the error rates).
    """

    name = "steady"

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self._before: Predictions | None = None

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        accepted = super().accepts(predictions)
        before, self._before = self._before, predictions
        if before is None:
            return accepted
        index = np.searchsorted(before.positions, predictions.positions)
        index = np.minimum(index, len(before.positions) - 1)
        same = before.positions[index] == predictions.positions
        same &= before.token_ids[index] == predictions.token_ids
        least = np.minimum(before.probabilities[index], predictions.probabilities)
        return accepted | (same & (least >= self.config.steady_threshold))
