# SPDX-License-Identifier: Apache-2.0
"""How each window row is drawn that does not take the most probable token: numbers for a kernel."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner.counter_random import key_of, streams_of
from vllm_elastic.runner.upload import Upload


class Confidence(enum.Enum):
    """What stands beside a drawn token; all but the first are Dream's (``Sampling.alg``)."""

    UNTEMPERED = 0  # its probability at temperature 1, as LLaDA's authors read it
    TEMPERED = 1  # its probability in the distribution that it was drawn from
    ENTROPY = 2
    MARGIN = 3


class Draws:
    """The D > 0 drawn rows among all window rows of a pass, put into the pass's upload.

    Attributes:
        integers: int32 [D, 4]: the window row; top-k, 0: all; whether there is noise, 0 or 1; the
            ``Confidence``.
        floats: float64 [D, 3]: temperature, 1 where there is no noise; the logarithm of min-p,
            -inf: all; top-p, 1: all.
        streams: int64 [D], of random numbers (``counter_random``).
    """

    def __init__(self, plans: Sequence[PassPlan], slices: Sequence[slice], upload: Upload) -> None:
        drawn = [
            (plan, plan.sampling, rows)
            for plan, rows in zip(plans, slices, strict=True)
            if plan.sampling is not None and is_drawn(plan.sampling)
        ]
        lengths = [rows.stop - rows.start for _, _, rows in drawn]

        def of_rows(of_plans: list[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
            return np.repeat(np.array(of_plans, dtype=dtype), lengths, axis=0)

        self._rows = np.concatenate([np.arange(rows.start, rows.stop) for _, _, rows in drawn])
        integers = of_rows([_integers(sampling) for _, sampling, _ in drawn], np.int32)
        integers[:, 0] = self._rows
        keys = of_rows(
            [key_of(sampling.seed, plan.denoising_step) for plan, sampling, _ in drawn], np.int64
        )
        positions = np.concatenate([plan.window for plan, _, _ in drawn], dtype=np.int64)
        self.integers = upload.put(integers)
        self.floats = upload.put(of_rows([_floats(sampling) for _, sampling, _ in drawn], float))
        streams = streams_of(torch.from_numpy(keys), torch.from_numpy(positions))
        self.streams = upload.put(streams.numpy())

    def within(self, rows: slice) -> slice:
        """Which of the draws are of these window rows."""
        return slice(*map(int, np.searchsorted(self._rows, (rows.start, rows.stop))))


def is_drawn(sampling: Sampling) -> bool:
    """Whether the most probable token and its probability are not what is wanted."""
    return sampling.temperature > 0 or sampling.alg is not None


def _integers(sampling: Sampling) -> tuple[int, int, int, int]:
    match sampling.alg:
        case None:
            confidence = Confidence.UNTEMPERED
        case "entropy":
            confidence = Confidence.ENTROPY
        case "topk_margin":
            confidence = Confidence.MARGIN
        case _:
            confidence = Confidence.TEMPERED
    is_noisy = sampling.temperature > 0
    return 0, max(0, sampling.top_k) if is_noisy else 0, int(is_noisy), confidence.value


def _floats(sampling: Sampling) -> tuple[float, float, float]:
    if sampling.temperature == 0:
        return 1.0, -math.inf, 1.0
    log_min_p = math.log(sampling.min_p) if sampling.min_p > 0 else -math.inf
    return sampling.temperature, log_min_p, sampling.top_p
