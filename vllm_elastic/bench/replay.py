# SPDX-License-Identifier: Apache-2.0
"""``bench replay``: recorded requests once more, through passes of a model of another size."""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_elastic.bench import machine
from vllm_elastic.bench.arguments import add_json, positive
from vllm_elastic.bench.dummy_model import add_sizes, dummy_engine, shape_of_sizes
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.recorded_plans import plans_of
from vllm_elastic.bench.scheduler_time import SchedulerSeconds, scheduler_seconds
from vllm_elastic.bench.simulation.batch import Batch, Capacity, Job
from vllm_elastic.bench.simulation.calibration import capacity_of
from vllm_elastic.bench.simulation.recording import (
    KINDS,
    RecordedRequest,
    Recording,
    policies_of,
    read_records,
)
from vllm_elastic.decoding.plan import PassPlan

DESCRIPTION = """\
Replays files of `bench run` through real passes of a LLaDA with random weights: each recorded
request's passes in order, with as many rows at the same relative depth, as large a window, and what
was measured; put together to steps by the scheduler's own code, as many requests at a time as the
batch has. Tokens are those of the recorded answers. What `bench simulate` predicts, this measures.
Around its passes the host is kept busy for as long as a step's scheduling took on requests of the
same policy. Run it on a machine that does nothing else.
"""


def add_parser(commands: Any) -> None:
    """Add ``replay`` to the command line."""
    parser = commands.add_parser(
        "replay",
        help="tokens/s of recorded runs through real passes of a larger model",
        description=DESCRIPTION,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="files of `bench run`")
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 16, 64], metavar="N")
    parser.add_argument(
        "--requests",
        type=positive,
        default=None,
        metavar="N",
        help="the recorded ones over and over (default: 2 batches, at least 16)",
    )
    parser.add_argument(
        "--async-scheduling",
        action="store_true",
        help="each setting once more, with two groups of requests that take turns",
    )
    add_json(parser)
    add_sizes(parser)
    parser.set_defaults(function=main)


@dataclass
class Run:
    """A file of ``bench run``.

    Attributes:
        policy: of its requests. plans: of every pass, in the order of the recording's ``work``.
    """

    recording: Recording
    policy: str
    plans: list[PassPlan]

    @classmethod
    def read(cls, path: Path, *, layers: int, vocabulary: int) -> Run:
        """
        Args:
            layers, vocabulary: of the model that runs it.

        Raises:
            SystemExit: what the file has cannot be replayed; names it and says why.
        """
        records = read_records(path)
        try:
            plans = [plan for record in records for plan in plans_of(record, layers, vocabulary)]
            policies = policies_of(records)
            if len(policies) > 1:
                raise ValueError(f"its requests have several policies: {', '.join(policies)}")
        except ValueError as error:
            raise SystemExit(f"{path}: {error}") from None
        return cls(Recording(path.stem, records, layers), policies[0], plans)

    @property
    def longest(self) -> int:
        """Positions of its longest canvas."""
        return max(request.canvas for request in self.recording.requests)


@dataclass
class Outcome:
    """What a replay took.

    Attributes:
        tokens: of the recorded answers. steps: passes of the engine; passes: of requests.
        seconds: from the first plan to the last result; kinds: of these, a step's in proportion to
            its passes' row-layers.
        row_layers: of all passes.
    """

    tokens: int
    steps: int
    passes: int
    seconds: float
    row_layers: int
    kinds: dict[str, float]


def main(args: argparse.Namespace) -> None:
    """Print a row for each run and batch size.

    Raises:
        SystemExit: a file cannot be replayed; names it.
    """
    shape = shape_of_sizes(args)
    sizes = {"layers": shape.layers, "vocabulary": shape.vocabulary}
    runs = [Run.read(path, **sizes) for path in args.runs]
    engine = dummy_engine(shape, args, args.batch_size, max(run.longest for run in runs))
    print(
        "| run | policy | batch | in flight | requests | tokens | steps | passes "
        f"| row-layers a token | tokens/s | {', '.join(KINDS)} | scheduling |"
    )
    print("|---" * 12 + "|", flush=True)
    here = machine.machine() | {"dtype": args.dtype}
    rows = []
    for batch, run in itertools.product(args.batch_size, runs):
        for row in _rows(engine, run, batch, args):
            rows.append(row)
            if args.json is not None:  # each time: a card is lent by the minute
                args.json.write_text(json.dumps({"machine": here, "runs": rows}, indent=1) + "\n")
    print(f"\n{machine.sentence(here)}, {args.dtype}; {shape.layers} layers of {shape.width}")


def _rows(
    engine: BenchEngine, run: Run, batch: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Replay a run at one batch size, with one pass at a time and, where asked for, two; prints
    its rows."""
    count = args.requests or max(16, 2 * batch)
    scheduling = scheduler_seconds(engine, run.policy, batch, run.longest)
    requests = list(itertools.islice(itertools.cycle(run.recording.requests), count))
    for in_flight in (1, 2) if args.async_scheduling else (1,):
        capacity = replace(capacity_of(engine), seats=batch, in_flight=in_flight)
        replay(engine.runner, run, capacity, requests[:1], scheduling)  # a warm-up
        outcome = replay(engine.runner, run, capacity, requests, scheduling)
        seconds, of_scheduler = outcome.seconds, outcome.steps * scheduling.together
        row = {
            "run": run.recording.name,
            "policy": run.policy,
            "batch_size": batch,
            "in_flight": in_flight,
            "requests": count,
            **asdict(outcome),
            "scheduling_seconds": of_scheduler,
            "tokens_per_second": outcome.tokens / seconds,
        }
        kinds = ", ".join(f"{outcome.kinds[kind] / seconds:.0%}" for kind in KINDS)
        print(
            f"| {run.recording.name} | {run.policy} | {batch} | {in_flight} | {count} | "
            f"{outcome.tokens} | {outcome.steps} | {outcome.passes} | "
            f"{outcome.row_layers / max(1, outcome.tokens):.0f} | "
            f"{row['tokens_per_second']:.1f} | {kinds} | {of_scheduler / seconds:.0%} |",
            flush=True,
        )
        yield row


def replay(
    runner: Any,
    run: Run,
    capacity: Capacity,
    requests: Sequence[RecordedRequest],
    scheduling: SchedulerSeconds,
) -> Outcome:
    """Serve the requests, all there at the start, through passes of the runner.

    The end, when the batch empties, is part of it. A pass is started as soon as it may be, then
    the oldest in flight is waited for, as in vLLM's engine loop. What the host does for a replay
    is a part of the time that ``scheduling`` takes.
    """
    import torch

    batch = Batch(capacity)
    for request in requests:
        batch.submit(Job(request, 0.0))
    places, columns = _Places(capacity), run.recording.columns
    kinds = dict.fromkeys(KINDS, 0.0)
    outcome = Outcome(sum(request.tokens for request in requests), 0, 0, 0.0, 0, kinds)
    passes: deque[Any] = deque()  # of the steps in flight
    started = time.perf_counter()
    with torch.inference_mode():
        while True:
            begun = time.perf_counter()
            while step := batch.take_step(outcome.seconds):
                plans = [
                    replace(
                        run.plans[each.index],
                        request_id=name,
                        block_ids=places.of(name, batch.running[name].request.canvas),
                    )
                    for name, each in step
                ]
                _busy_until(begun + scheduling.planning)
                passes.append(runner.start(plans))
                begun = time.perf_counter()
            if not passes:
                return outcome
            passes.popleft().results()  # waits for them
            begun = time.perf_counter()
            oldest = batch.in_flight[0]
            of_kinds = run.recording.work[[each.index for _, each in oldest]].sum(axis=0)
            of_kinds = of_kinds[columns.kinds]
            batch.end_step(outcome.seconds)
            places.free({name for name, _ in oldest} - batch.running.keys())
            _busy_until(begun + scheduling.results)
            now = time.perf_counter() - started
            for kind, share in zip(KINDS, of_kinds / of_kinds.sum(), strict=True):
                kinds[kind] += float(share) * (now - outcome.seconds)
            outcome.row_layers += int(of_kinds.sum())
            outcome.seconds = now
            outcome.steps += 1
            outcome.passes += len(oldest)


def _busy_until(moment: float) -> None:
    """Wait as Python does that works on something else: the device goes on, this thread does
    not."""
    while time.perf_counter() < moment:
        pass


class _Places:
    """KV blocks of the requests that run; block 0 is nobody's."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._free = list(range(capacity.blocks, 0, -1))
        self._taken: dict[str, npt.NDArray[np.int32]] = {}

    def of(self, name: str, canvas: int) -> npt.NDArray[np.int32]:
        if name not in self._taken:
            count = self._capacity.blocks_of(canvas)
            self._taken[name] = np.array([self._free.pop() for _ in range(count)], np.int32)
        return self._taken[name]

    def free(self, names: set[str]) -> None:
        for name in names:
            self._free += self._taken.pop(name).tolist()
