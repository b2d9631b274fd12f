# SPDX-License-Identifier: Apache-2.0
"""Dream's own schedule: how many of all masks a step commits, and which."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.by_rank import by_rank
from vllm_elastic.decoding.canvas import Canvas, Positions
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.random_numbers import uniform

LAST_TIME = 1e-3
"""Dream's ``eps``, which nobody changes."""


class DreamSteps:
    """Dream's ``diffusion_generate``: time falls from 1 to ``LAST_TIME`` in equal steps, and a step
    from t to s commits the share 1 - s / t of the masks that are left, wherever they are; the last
    step commits all.

    ``origin`` takes each mask with that chance. The others take the share's whole number, the
    first of which may be 0, by their confidence, or, with ``alg_temp``, draw them without
    replacement from softmax(confidence / alg_temp): the largest of these numbers with Gumbel
    noise, which is the same (Efraimidis and Spirakis 2006).

    Raises:
        ValueError: knobs that do not go together, or more masks than a step may predict.
    """

    def __init__(self, config: ElasticConfig, num_new_tokens: int, seed: int = 0) -> None:
        assert config.alg is not None
        for other, meant in (
            ("policy 'dual-cache'", config.policy == "dual-cache"),
            ("'elastic_confidence_eos_eot_inf'", config.confidence_eos_eot_inf),
        ):
            if meant:
                raise ValueError(f"'elastic_alg' and {other} do not go together: leave one out.")
        if num_new_tokens > config.max_window:
            raise ValueError(
                f"max_tokens {num_new_tokens}: with 'elastic_alg' a step predicts them all, and "
                f"the engine's 'max_window' {config.max_window} is the most that it may; lower "
                "max_tokens, leave elastic_alg out, or raise max_window with --elastic-config."
            )
        self._alg, self._alg_temp = config.alg, config.alg_temp
        self._steps = config.steps or num_new_tokens
        self._seed = seed

    def window(self, canvas: Canvas) -> Positions:
        """The positions of all masks."""
        return canvas.first_masked(canvas.length)

    def choose(self, canvas: Canvas, predictions: Predictions, step: int) -> npt.NDArray[np.intp]:
        """Indices of the predictions that are committed, ascending; perhaps none.

        Args:
            predictions: of all masks, with the confidences that ``alg`` names.
        """
        window, probabilities = predictions.positions, predictions.probabilities
        if step >= self._steps - 1:
            return np.arange(len(window))
        share = 1 - self._time(step + 1) / self._time(step)
        if self._alg == "origin":
            return np.flatnonzero(uniform(self._seed, step, canvas.length)[window] < share)
        priorities = probabilities
        if self._alg_temp > 0:
            # Its smallest number but 0, whose logarithm would be no number.
            numbers = np.maximum(uniform(self._seed, step, canvas.length)[window], 2.0**-53)
            priorities = probabilities / self._alg_temp - np.log(-np.log(numbers))
        return by_rank(priorities, int(len(window) * share))

    def _time(self, step: int) -> float:
        return 1 - (1 - LAST_TIME) * step / self._steps
