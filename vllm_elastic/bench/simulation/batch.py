# SPDX-License-Identifier: Apache-2.0
"""Recorded requests in one engine: admission by KV blocks, the scheduler's turns. No clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from vllm_elastic.bench.simulation.recording import RecordedPass, RecordedRequest
from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.decoding.overlap import next_group_size
from vllm_elastic.decoding.round_robin import RoundRobin


@dataclass(frozen=True)
class Capacity:
    """What bounds a batch.

    Attributes:
        seats: requests at a time (``max_num_seqs``).
        blocks: KV blocks; block_size: positions a block has.
        limits: of a step.
        in_flight: steps at a time; two with ``--async-scheduling``.
    """

    seats: int
    blocks: int
    block_size: int
    limits: StepLimits
    in_flight: int = 1

    def blocks_of(self, canvas: int) -> int:
        return -(-canvas // self.block_size)


@dataclass(slots=True)
class Job:
    """A request on its way; seconds on the clock of whoever times the steps."""

    request: RecordedRequest
    arrived: float
    admitted: float = 0.0
    ended: float = 0.0
    next_pass: int = 0


Step = list[tuple[str, RecordedPass]]
"""Requests, by the names they got, and their passes."""


class Batch:
    """Serves jobs in the order in which they come.

    Admission is the scheduler's: while a seat and the blocks of the next request's whole canvas
    are free. What a step is made of is the scheduler's own code, ``RoundRobin`` and
    ``next_group_size``.

    Attributes:
        outstanding: jobs that were submitted and have not ended.
        done: ended jobs.
        in_flight: the steps that run, the oldest first.
        running: the jobs that were admitted and have not ended, by the name they got.
    """

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._free_blocks = capacity.blocks
        self._waiting: deque[Job] = deque()
        self.running: dict[str, Job] = {}
        self._round_robin = RoundRobin()
        self.in_flight: deque[Step] = deque()
        self._num_admitted = 0
        self.outstanding = 0
        self.done: list[Job] = []

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises:
            ValueError: its canvas has more blocks than there are.
        """
        if self._capacity.blocks_of(job.request.canvas) > self._capacity.blocks:
            raise ValueError(f"a canvas of {job.request.canvas} positions never fits")
        self._waiting.append(job)
        self.outstanding += 1

    def take_step(self, now: float) -> Step | None:
        """Admit, and put the next step behind those in flight; None: there is nothing to do, or
        as many are in flight as may be."""
        if len(self.in_flight) == self._capacity.in_flight:
            return None
        self._admit(now)
        flying = {name for step in self.in_flight for name, _ in step}
        free = [name for name in self.running if name not in flying]
        most = None
        if self._capacity.in_flight > 1:
            most = next_group_size([self._plan_of(name) for name in free], len(flying))
        step = self._round_robin.take(free, self._plan_of, self._capacity.limits, most)
        if not step:
            return None
        self.in_flight.append(step)
        return step

    def end_step(self, now: float) -> list[Job]:
        """Finish the oldest step in flight; returns the jobs that ended with it."""
        ended = []
        for request_id, _ in self.in_flight.popleft():
            job = self.running[request_id]
            job.next_pass += 1
            if job.next_pass == len(job.request.passes):
                job.ended = now
                del self.running[request_id]
                self._round_robin.remove(request_id)
                self._free_blocks += self._capacity.blocks_of(job.request.canvas)
                ended.append(job)
        self.outstanding -= len(ended)
        self.done += ended
        return ended

    def _plan_of(self, request_id: str) -> RecordedPass:
        job = self.running[request_id]
        return job.request.passes[job.next_pass]

    def _admit(self, now: float) -> None:
        while self._waiting and len(self.running) < self._capacity.seats:
            blocks = self._capacity.blocks_of(self._waiting[0].request.canvas)
            if blocks > self._free_blocks:
                return
            job = self._waiting.popleft()
            job.admitted = now
            self._free_blocks -= blocks
            request_id = str(self._num_admitted)
            self._num_admitted += 1
            self.running[request_id] = job
            self._round_robin.add(request_id)
