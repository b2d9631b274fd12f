# SPDX-License-Identifier: Apache-2.0
"""What a policy wants a pass to measure, and what is measured: one pair of values for each kind.

A plan carries a ``Measure`` or None, its result the ``Measured`` of the same kind or None.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions


@dataclass(frozen=True, slots=True)
class DriftTest:
    """Elastic-Cache's test (arXiv 2510.14973): has attention drifted, what is most attended now?

    Attributes:
        tested: rows of the first segment whose attention is compared before and after the pass.
        tested_layers: layers, counted from 0, in which no stale row takes part yet; None: all.
        trackable: bool [T], positions that may be tracked from now on.
        track_num: positions tracked in each layer.
        statistic: ``released`` or ``paper``, see ``ElasticConfig``.
    """

    tested: Positions
    tested_layers: int | None
    trackable: npt.NDArray[np.bool_]
    track_num: int
    statistic: str


@dataclass(slots=True)
class MeasuredDrift:
    """What a ``DriftTest`` finds.

    Attributes:
        most_attended: int32 [layers, track_num], layers from the pass's start layer on, by the
            attention that the window pays; -1 where fewer positions may be tracked.
        similarities: float32 [tested layers], 1 = no drift, NaN in layers whose input is not
            stored; None: nothing was tested.
    """

    most_attended: npt.NDArray[np.int32]
    similarities: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class BlockProbe:
    """What ``elastic-block`` asks: what attention positions are paid, how far probes have drifted.

    Attributes:
        probes: rows of the first segment whose stored hidden states are compared with the new.
        watched: bool [T], positions whose attention the policy is going to count.
        attention_stride: attention is read in the last layer and every n-th before it.
    """

    probes: Positions
    watched: npt.NDArray[np.bool_]
    attention_stride: int = 1


@dataclass(slots=True)
class MeasuredProbes:
    """What a ``BlockProbe`` finds.

    Attributes:
        attention: float32 [T], each position's share of the window's attention, mean over heads
            and read layers, watched or not.
        probe_drift: float32 [probes, L], relative change of each layer's input (0 in layer 0,
            whose input is the embedding, and where it is not stored); None: no probes.
    """

    attention: npt.NDArray[np.float32]
    probe_drift: npt.NDArray[np.float32] | None = None


Measure = DriftTest | BlockProbe
Measured = MeasuredDrift | MeasuredProbes
