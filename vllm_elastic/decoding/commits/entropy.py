# SPDX-License-Identifier: Apache-2.0
"""So many tokens that what each of them leaves open adds up to little."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.commits.base import CommitRule, largest_prefix
from vllm_elastic.decoding.predictions import Predictions


class Entropy(CommitRule):
    """The n most probable, for the largest n whose entropies without the largest of them add up to
    ``entropy_bound`` or less.

    EB-Sampler (arXiv 2505.24857), in the order of confidence: the sum without the largest bounds
    what the tokens of one step say about each other. One token alone is always within the bound;
    it is sure only where its own entropy is.
    """

    name = "entropy"
    needs_entropies = True

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        probabilities, entropies = predictions.probabilities, predictions.entropies
        assert entropies is not None
        ranked = entropies[np.argsort(-probabilities, kind="stable")]
        shared = np.cumsum(ranked) - np.maximum.accumulate(ranked)
        shared[0] = ranked[0]
        return largest_prefix(probabilities, shared <= self.config.entropy_bound)
