# SPDX-License-Identifier: Apache-2.0
"""One engine on a virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_elastic.bench.simulation.batch import Batch, Capacity
from vllm_elastic.bench.simulation.cost_model import BOUNDS, CostModel
from vllm_elastic.bench.simulation.device import PARTS
from vllm_elastic.bench.simulation.recording import KINDS, Floats, Recording


@dataclass
class Busy:
    """Where the time of a replica's steps went, in seconds.

    Attributes:
        parts: [parts, 2], as ``CostModel.work_seconds``; host: what the host added.
        kinds: of ``KINDS``: a step's seconds in proportion to its passes' row-layers.
    """

    steps: int = 0
    seconds: float = 0.0
    host: float = 0.0
    parts: Floats = field(default_factory=lambda: np.zeros((len(PARTS), len(BOUNDS))))
    kinds: Floats = field(default_factory=lambda: np.zeros(len(KINDS)))

    def add(self, other: Busy) -> None:
        """Take another replica's time in."""
        self.steps += other.steps
        self.seconds += other.seconds
        self.host += other.host
        self.parts += other.parts
        self.kinds += other.kinds


class Replica(Batch):
    """A batch whose steps are timed by a cost model.

    Attributes:
        busy: where the time went.
        steps: the summed work of each step (``Columns``), with ``keep_steps`` only.
    """

    def __init__(
        self,
        recording: Recording,
        cost: CostModel,
        capacity: Capacity,
        *,
        keep_steps: bool = False,
    ) -> None:
        super().__init__(capacity)
        self.cost = cost
        self._recording = recording
        self._keep_steps = keep_steps
        self.steps: list[Floats] = []
        self.busy = Busy()

    def begin_step(self, now: float) -> float | None:
        """Admit, and start a step; returns when it ends, or None: there is nothing to do."""
        if not self.take_step(now):
            return None
        work = self._recording.work[[plan.index for _, plan in self.current]].sum(axis=0)
        parts, host = self.cost.step_seconds(work)
        seconds = float(parts.sum() + host)
        if self._keep_steps:
            self.steps.append(work)
        kinds = work[self.cost.columns.kinds]
        self.busy.steps += 1
        self.busy.seconds += seconds
        self.busy.host += float(host)
        self.busy.parts += parts
        self.busy.kinds += kinds * (seconds / kinds.sum())
        return now + seconds
