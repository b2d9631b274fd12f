# SPDX-License-Identifier: Apache-2.0
"""One engine on a virtual clock: admission by KV blocks, the scheduler's turns, timed steps."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from vllm_elastic.bench.simulation.cost_model import BOUNDS, CostModel
from vllm_elastic.bench.simulation.device import PARTS
from vllm_elastic.bench.simulation.recording import (
    KINDS,
    Floats,
    RecordedPass,
    RecordedRequest,
    Recording,
)
from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.decoding.round_robin import RoundRobin


@dataclass(frozen=True)
class Capacity:
    """What bounds a batch.

    Attributes:
        seats: requests at a time (``max_num_seqs``).
        blocks: KV blocks; block_size: positions a block has.
        limits: of a step.
    """

    seats: int
    blocks: int
    block_size: int
    limits: StepLimits

    def blocks_of(self, canvas: int) -> int:
        return -(-canvas // self.block_size)


@dataclass(slots=True)
class Job:
    """A request on its way; seconds on the virtual clock."""

    request: RecordedRequest
    arrived: float
    admitted: float = 0.0
    ended: float = 0.0
    next_pass: int = 0


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


class Replica:
    """Serves jobs in the order in which they come.

    Admission is the scheduler's: while a seat and the blocks of the next request's whole canvas
    are free. What a step is made of is the scheduler's own code, ``RoundRobin``.

    Attributes:
        outstanding: jobs that were submitted and have not ended.
        done: ended jobs.
        busy: where the time went.
        current: requests and passes of the step that runs; empty between steps.
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
        self.cost = cost
        self._recording = recording
        self._capacity = capacity
        self._free_blocks = capacity.blocks
        self._waiting: deque[Job] = deque()
        self._running: dict[str, Job] = {}
        self._round_robin = RoundRobin()
        self.current: list[tuple[str, RecordedPass]] = []
        self._keep_steps = keep_steps
        self.steps: list[Floats] = []
        self._num_admitted = 0
        self.outstanding = 0
        self.done: list[Job] = []
        self.busy = Busy()

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ValueError: its canvas has more blocks than there are.
        """
        if self._capacity.blocks_of(job.request.canvas) > self._capacity.blocks:
            raise ValueError(f"a canvas of {job.request.canvas} positions never fits")
        self._waiting.append(job)
        self.outstanding += 1

    def begin_step(self, now: float) -> float | None:
        """Admit, and start a step; returns when it ends, or None: there is nothing to do."""
        self._admit(now)
        if not self._running:
            return None
        self.current = self._round_robin.take(self._running, self._plan_of, self._capacity.limits)
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

    def end_step(self, now: float) -> list[Job]:
        """Finish the step that was begun; returns the jobs that ended with it."""
        ended = []
        for request_id, _ in self.current:
            job = self._running[request_id]
            job.next_pass += 1
            if job.next_pass == len(job.request.passes):
                job.ended = now
                del self._running[request_id]
                self._round_robin.remove(request_id)
                self._free_blocks += self._capacity.blocks_of(job.request.canvas)
                ended.append(job)
        self.current = []
        self.outstanding -= len(ended)
        self.done += ended
        return ended

    def _plan_of(self, request_id: str) -> RecordedPass:
        job = self._running[request_id]
        return job.request.passes[job.next_pass]

    def _admit(self, now: float) -> None:
        while self._waiting and len(self._running) < self._capacity.seats:
            blocks = self._capacity.blocks_of(self._waiting[0].request.canvas)
            if blocks > self._free_blocks:
                return
            job = self._waiting.popleft()
            job.admitted = now
            self._free_blocks -= blocks
            request_id = str(self._num_admitted)
            self._num_admitted += 1
            self._running[request_id] = job
            self._round_robin.add(request_id)
