# SPDX-License-Identifier: Apache-2.0
"""What a commit rule decides, and when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.predictions import Predictions

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig


class CommitRule:
    """Says which predictions of a step are sure enough to be committed together.

    Made for one request, and asked after each of its steps.

    Attributes:
        name: what ``commit`` in the config calls it.
        needs_entropies: whether a pass has to report them.
    """

    name: ClassVar[str]
    needs_entropies: ClassVar[bool] = False

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config

    def weighed(self, predictions: Predictions) -> Predictions:
        """The step's predictions with the probabilities that the rule goes by."""
        return predictions

    def accepts(self, predictions: Predictions) -> npt.NDArray[np.bool_]:
        """bool [W]: what the rule would commit of its own accord, perhaps nothing.

        Args:
            predictions: the step's, weighed; the first masked position is among them, and so is
                everything that the step before predicted and did not commit.
        """
        raise NotImplementedError

    @final
    def choose(self, predictions: Predictions) -> npt.NDArray[np.intp]:
        """Indices of the predictions that are committed, ascending, at least one.

        Where nothing is sure it is the best, with those equal to it; of zeros only the earliest,
        since all of them would be guesses: a probability of 0 (``confidence_eos_eot_inf``, a
        predicted end) is one under any rule.
        """
        predictions = self.weighed(predictions)
        probabilities, accepted = predictions.probabilities, self.accepts(predictions)
        sure = (accepted & (probabilities > 0)).nonzero()[0]
        if len(sure):
            return sure
        best = (probabilities == probabilities.max()).nonzero()[0]
        return best if probabilities[best[0]] > 0 else best[:1]


def largest_prefix(
    probabilities: npt.NDArray[np.float64], fits: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """bool [W]: the n most probable, for the largest n that fits; equals go to the smaller index.

    Args:
        fits: bool [W], whether the 1, 2, ... W most probable may be committed together.
    """
    allowed = np.flatnonzero(fits)
    count = allowed[-1] + 1 if len(allowed) else 0
    chosen = np.zeros(len(probabilities), dtype=np.bool_)
    chosen[np.argsort(-probabilities, kind="stable")[:count]] = True
    return chosen
