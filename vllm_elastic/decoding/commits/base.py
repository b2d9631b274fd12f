# SPDX-License-Identifier: Apache-2.0
"""What a commit rule decides, and when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, final

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig


class CommitRule:
    """Says which predictions of a step are sure enough to be committed together.

    A rule sees one step's predictions and keeps nothing from one step to the next.

    Attributes:
        name: what ``commit`` in the config calls it.
        needs_entropies: whether a pass has to report them.
    """

    name: ClassVar[str]
    needs_entropies: ClassVar[bool] = False

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config

    def accepts(
        self,
        window: Positions,
        probabilities: npt.NDArray[np.float64],
        entropies: npt.NDArray[np.float64] | None,
    ) -> npt.NDArray[np.bool_]:
        """bool [W]: what the rule would commit of its own accord, perhaps nothing.

        Asked after every step that commits by rule.

        Args:
            window: the positions predicted, ascending, W >= 1; the first masked one among them.
            probabilities: float64 [W], of each position's prediction.
            entropies: float64 [W], of its distribution, in nats; None where not needed.
        """
        raise NotImplementedError

    @final
    def choose(
        self,
        window: Positions,
        probabilities: npt.NDArray[np.float64],
        entropies: npt.NDArray[np.float64] | None,
    ) -> npt.NDArray[np.intp]:
        """Indices into the window that are committed, ascending, at least one.

        Where nothing is sure it is the best, with those equal to it; of zeros only the earliest,
        since all of them would be guesses: a probability of 0 (``confidence_eos_eot_inf``, a
        predicted end) is one under any rule.
        """
        accepted = self.accepts(window, probabilities, entropies)
        sure = np.flatnonzero(accepted & (probabilities > 0))
        if len(sure):
            return sure
        best = np.flatnonzero(probabilities == probabilities.max())
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
