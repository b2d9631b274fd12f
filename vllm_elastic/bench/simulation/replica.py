# SPDX-License-Identifier: Apache-2.0
"""One engine on a virtual clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from vllm_elastic.bench.simulation.batch import Batch, Capacity, Job
from vllm_elastic.bench.simulation.cost_model import BOUNDS, CostModel
from vllm_elastic.bench.simulation.device import PARTS
from vllm_elastic.bench.simulation.recording import KINDS, Floats, Recording


@dataclass
class Busy:
    """Where the time of a replica's steps went, in seconds.

    Attributes:
        seconds: while any step was in flight.
        parts: of these the device's, [parts, 2] as ``CostModel.work_seconds``.
        kinds: of ``KINDS``: a step's seconds in proportion to its passes' row-layers.
    """

    steps: int = 0
    seconds: float = 0.0
    parts: Floats = field(default_factory=lambda: np.zeros((len(PARTS), len(BOUNDS))))
    kinds: Floats = field(default_factory=lambda: np.zeros(len(KINDS)))

    @property
    def host(self) -> float:
        """Seconds that the host added: the device had nothing to do."""
        return self.seconds - float(self.parts.sum())

    def add(self, other: Busy) -> None:
        """Take another replica's time in."""
        self.steps += other.steps
        self.seconds += other.seconds
        self.parts += other.parts
        self.kinds += other.kinds


@dataclass(frozen=True, slots=True)
class TimedStep:
    """A step in flight.

    Attributes:
        work: of its passes (``Columns``); parts: of the device's seconds.
        device_end: when the device has done with it; results: seconds of the host after that.
    """

    work: Floats
    parts: Floats
    device_end: float
    results: float


class Replica(Batch):
    """A batch whose steps are timed by a cost model.

    One host plans a step and launches it, then waits for the oldest one in flight and takes its
    results in, as vLLM's ``EngineCore.step_with_batch_queue``. The device takes steps in turn.

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
        self._timed: deque[TimedStep] = deque()
        self._device_free = 0.0
        self._busy_since = 0.0
        self.steps: list[Floats] = []
        self.busy = Busy()

    def begin_steps(self, now: float) -> float | None:
        """Admit, and start steps while any may be; returns when the results of the oldest are
        taken in, or None: there is nothing to do."""
        if not self.in_flight:
            self._busy_since = now
        while step := self.take_step(now):
            work = self._recording.work[[plan.index for _, plan in step]].sum(axis=0)
            parts, host = self.cost.step_seconds(work)
            now += float(host.planning)
            device_end = max(now, self._device_free) + float(parts.sum()) + float(host.delaying)
            now += float(host.launching)
            self._device_free = max(device_end, now)
            self._timed.append(TimedStep(work, parts, self._device_free, float(host.results)))
            if self._keep_steps:
                self.steps.append(work)
        if not self._timed:
            return None
        oldest = self._timed[0]
        return max(now, oldest.device_end) + oldest.results

    def end_step(self, now: float) -> list[Job]:
        """Finish the oldest step in flight; returns the jobs that ended with it."""
        timed = self._timed.popleft()
        seconds, self._busy_since = now - self._busy_since, now
        kinds = timed.work[self.cost.columns.kinds]
        self.busy.steps += 1
        self.busy.seconds += seconds
        self.busy.parts += timed.parts
        self.busy.kinds += kinds * (seconds / kinds.sum())
        return super().end_step(now)
