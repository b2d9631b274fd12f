# SPDX-License-Identifier: Apache-2.0
"""Replicas behind a router: closed loops, or Poisson arrivals."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vllm_elastic.bench.simulation.batch import Job
from vllm_elastic.bench.simulation.cost_model import BOUNDS
from vllm_elastic.bench.simulation.device import PARTS
from vllm_elastic.bench.simulation.recording import KINDS, RecordedRequest, Recording
from vllm_elastic.bench.simulation.replica import Busy, Replica

ROUTERS = ("round-robin", "least-outstanding")


@dataclass
class Outcome:
    """What the simulated replicas of a cluster did.

    Attributes:
        replicas: in the cluster; simulated: of these, those the figures come from.
        seconds: from the first arrival to the last answer, of each simulated replica.
        latencies: seconds of each request: from its arrival, or from its admission in a closed
            loop, where nobody arrives before there is a seat.
    """

    replicas: int
    simulated: int
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    busy: Busy = field(default_factory=Busy)

    def add(self, replica: Replica, seconds: float, *, closed: bool) -> None:
        """Take one replica's finished work in."""
        self.tokens.append(sum(job.request.tokens for job in replica.done))
        self.seconds.append(seconds)
        self.latencies += [
            job.ended - (job.admitted if closed else job.arrived) for job in replica.done
        ]
        self.busy.add(replica.busy)

    @property
    def tokens_per_second(self) -> float:
        """The mean of the replicas."""
        rates = [t / s for t, s in zip(self.tokens, self.seconds, strict=True) if s]
        return float(np.mean(rates)) if rates else 0.0

    def summary(self) -> dict[str, Any]:
        """The figures of a table row; shares are of the time in steps."""
        busy = self.busy
        shares = {
            f"{part}, {bound}": float(busy.parts[i, j]) / busy.seconds
            for i, part in enumerate(PARTS)
            for j, bound in enumerate(BOUNDS)
            if busy.parts[i, j]
        }
        shares["host"] = busy.host / busy.seconds
        median, p99 = np.percentile(self.latencies, [50, 99])
        return {
            "replicas": self.replicas,
            "simulated_replicas": self.simulated,
            "requests": len(self.latencies),
            "steps": busy.steps,
            "tokens_per_second_and_replica": self.tokens_per_second,
            "tokens_per_second": self.tokens_per_second * self.replicas,
            "latency_median": float(median),
            "latency_p99": float(p99),
            "busy": busy.seconds / sum(self.seconds),
            "kinds": dict(zip(KINDS, (busy.kinds / busy.seconds).tolist(), strict=True)),
            "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
        }


class Draw:
    """Requests of a recording without end: all of them in a random order, over and over."""

    def __init__(self, recording: Recording, rng: np.random.Generator) -> None:
        self._requests = recording.requests
        self._rng = rng
        self._left: list[int] = []

    def __iter__(self) -> Iterator[RecordedRequest]:
        while True:
            if not self._left:
                self._left = self._rng.permutation(len(self._requests)).tolist()
            yield self._requests[self._left.pop()]


def run_closed(replica: Replica, requests: Sequence[RecordedRequest]) -> float:
    """Serve requests that are all there at the start; returns the seconds it took."""
    for request in requests:
        replica.submit(Job(request, 0.0))
    now = 0.0
    while (end := replica.begin_steps(now)) is not None:
        now = end
        replica.end_step(now)
    return now


def closed_loop(
    make_replica: Callable[[], Replica],
    recording: Recording,
    *,
    replicas: int,
    sample: int,
    requests: int,
    seed: int,
) -> Outcome:
    """Every replica has ``requests`` requests of its own and always a full batch, until they end.

    Replicas have nothing to do with each other, so ``sample`` of them stand for all.
    """
    outcome = Outcome(replicas, min(replicas, sample))
    for index in range(outcome.simulated):
        draw = iter(Draw(recording, np.random.default_rng([seed, index])))
        replica = make_replica()
        seconds = run_closed(replica, [next(draw) for _ in range(requests)])
        outcome.add(replica, seconds, closed=True)
    return outcome


def open_loop(
    make_replica: Callable[[], Replica],
    recording: Recording,
    *,
    replicas: int,
    sample: int,
    requests: int,
    rate: float,
    router: str,
    seed: int,
) -> Outcome:
    """Poisson arrivals at ``rate`` requests a second and replica, over the whole cluster.

    Round robin gives a replica every N-th arrival, so ``sample`` of the N replicas are simulated
    one by one, with exactly the arrivals that they would see. Behind a router that looks at all of
    them, ``sample`` replicas and their share of the arrivals are simulated together: a smaller
    cluster with the same load.
    """
    outcome = Outcome(replicas, min(replicas, sample))
    fleet = [make_replica() for _ in range(outcome.simulated)]
    if router == "round-robin":
        for index, replica in enumerate(fleet):
            rng = np.random.default_rng([seed, index])
            draw = iter(Draw(recording, rng))
            # Its first arrival is one of the cluster's first N, then it gets every N-th.
            turn = 1 + index * replicas // len(fleet)
            gaps = rng.gamma(replicas, 1 / (rate * replicas), requests)
            gaps[0] = rng.gamma(turn, 1 / (rate * replicas))
            jobs = [Job(next(draw), float(time)) for time in np.cumsum(gaps)]
            _serve([replica], jobs)
    else:
        rng = np.random.default_rng(seed)
        draw = iter(Draw(recording, rng))
        count = requests * len(fleet)
        times = np.cumsum(rng.exponential(1 / (rate * len(fleet)), count))
        _serve(fleet, [Job(next(draw), float(time)) for time in times])
    for replica in fleet:
        last = max((job.ended for job in replica.done), default=0.0)
        first = min((job.arrived for job in replica.done), default=0.0)
        outcome.add(replica, last - first, closed=False)
    return outcome


def _serve(fleet: Sequence[Replica], jobs: Sequence[Job]) -> None:
    """Send each job, in order of arrival, to the replica with the fewest outstanding."""
    router = _LeastOutstanding(len(fleet))
    ends: list[tuple[float, int]] = []  # when a replica's oldest step ends, and which replica

    def begin(index: int, now: float) -> None:
        end = fleet[index].begin_steps(now)
        if end is not None:
            heapq.heappush(ends, (end, index))

    def run_until(limit: float) -> None:
        while ends and ends[0][0] <= limit:
            now, index = heapq.heappop(ends)
            router.outstanding[index] -= len(fleet[index].end_step(now))
            begin(index, now)

    for job in jobs:
        run_until(job.arrived)
        index = router.choose()
        fleet[index].submit(job)
        if not fleet[index].in_flight:
            begin(index, job.arrived)
    run_until(np.inf)


class _LeastOutstanding:
    """Equals take turns, so that a cluster with little to do uses all of its replicas."""

    def __init__(self, count: int) -> None:
        self.outstanding = np.zeros(count, dtype=np.int64)
        self._behind = np.arange(count)  # places behind the replica that was chosen last
        self._next = 0

    def choose(self) -> int:
        count = len(self.outstanding)
        index = int(np.argmin(self.outstanding * count + (self._behind - self._next) % count))
        self.outstanding[index] += 1
        self._next = index + 1
        return index
