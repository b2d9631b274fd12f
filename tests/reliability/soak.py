# SPDX-License-Identifier: Apache-2.0
"""``soak``: a server at full load for a while; nothing may be lost, doubled or leaked."""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tqdm import tqdm

from tests.reliability.exchange import Answer, Ask
from tests.reliability.server_state import ServerState, read_state
from tests.reliability.traffic import Load, Tally, ask_again, ask_alone, mixed_asks
from vllm_elastic.bench.server import ServerProcess

TINY_LLADA = Path("examples/tiny_llada/checkpoint")
POSITIONS = 512
DRAIN_SECONDS = 60.0
SAMPLE_SECONDS = 5.0


def add_parser(commands: Any) -> None:
    """Add ``soak`` to the command line."""
    parser = commands.add_parser(
        "soak",
        help="a server at full load: answers, memory and KV blocks afterwards",
        description="Starts `vllm serve`, asks each of a set of different requests alone, then "
        "keeps hundreds of them in flight over a small KV cache, whole, streamed and left in the "
        "middle, and compares every answer with the first. Float32, so they must be the same.",
    )
    parser.add_argument("--model", type=Path, default=TINY_LLADA, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=30.0, metavar="M")
    parser.add_argument(
        "--warm-up-minutes",
        type=float,
        default=3.0,
        metavar="M",
        help="load before the first figure is taken (default: %(default)s)",
    )
    parser.add_argument("--clients", type=int, default=300, metavar="N", help="in flight")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="different ones")
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=int,
        default=32 << 20,
        metavar="N",
        help="small, so that requests wait for blocks (default: %(default)s)",
    )
    parser.add_argument(
        "--allowed-growth",
        type=float,
        default=32.0,
        metavar="MIB",
        help="of a process's memory from start to end (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("out/soak"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(function=main)


def main(args: argparse.Namespace) -> None:
    """Run the soak, print the closing table, write ``memory.csv`` and the server's log.

    Raises:
        SystemExit: something failed, was lost, doubled, or leaked.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    asks = mixed_asks(args.requests, args.model, args.seed)
    options = ["--dtype", "float32", "--max-model-len", str(POSITIONS)]
    options += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    with ServerProcess(args.model, options, log=args.out / "server.log") as server:
        print(f"{server.command_line}\n{len(asks)} different requests, each alone", flush=True)
        right = ask_alone(server.address, asks)
        log = MemoryLog(args.out / "memory.csv")
        print(f"warm-up, {args.warm_up_minutes:g} min", flush=True)
        warm_up = soak(server, asks, right, args.warm_up_minutes * 60, args.clients, log, 1)
        print(f"full load, {args.minutes:g} min, {args.clients} in flight", flush=True)
        run = soak(server, asks, right, args.minutes * 60, args.clients, log, 2 + args.clients)
        after = ask_again(server.address, asks, right)
    problems = [
        *find_problems(warm_up),
        *find_problems(run, args.allowed_growth),
        *(after.examples or ([] if after.is_clean else ["wrong answers after the load"])),
    ]
    print(table(run))
    print(f"The same requests alone afterwards: {after.wrong + after.failures} changed.")
    if problems:
        raise SystemExit("\n".join(["FAILED", *problems]))


@dataclass(frozen=True)
class SoakRun:
    """One period of load.

    Attributes:
        seconds: of full load, without the time the queue took to drain.
        start: the idle server before the load; end: after it, when all answers had come.
        samples: the server under load, every few seconds.
    """

    seconds: float
    start: ServerState
    end: ServerState
    samples: list[ServerState]
    tally: Tally


class MemoryLog:
    """A CSV file of the server's state over time, from the log's creation on."""

    COLUMNS = ("seconds", "running", "waiting", "blocks_in_use")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._started = time.monotonic()
        self._roles: list[str] = []

    def write(self, state: ServerState) -> None:
        """Append a line: when, what it serves, MiB of each process."""
        new = not self._roles
        self._roles = self._roles or list(state.memory)
        row = [round(time.monotonic() - self._started, 1)]
        row += [state.running, state.waiting, state.blocks_in_use]
        row += [round(state.memory.get(role, 0.0), 1) for role in self._roles]
        with self.path.open("w" if new else "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow([*self.COLUMNS, *(f"{role} MiB" for role in self._roles)])
            writer.writerow(row)


def soak(
    server: ServerProcess,
    asks: Sequence[Ask],
    right: Sequence[Answer],
    seconds: float,
    clients: int,
    log: MemoryLog | None = None,
    seed: int = 0,
) -> SoakRun:
    """Keep ``clients`` requests in flight for ``seconds``, let them end, and say how it went."""
    start = wait_until_idle(server)
    load = Load(server.address, asks, right, clients=clients, leave_share=0.2, seed=seed)
    with _sampling(server, log) as samples, load:
        for _ in tqdm(range(round(seconds)), "load", unit="s", leave=False, disable=None):
            time.sleep(1)
    return SoakRun(seconds, start, wait_until_idle(server), samples, load.tally)


@contextmanager
def _sampling(server: ServerProcess, log: MemoryLog | None) -> Iterator[list[ServerState]]:
    """Read the server's state every few seconds."""
    samples: list[ServerState] = []
    done = Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS if samples else 1.0):
            try:
                samples.append(read_state(server))
            except OSError:
                continue  # a server that is gone shows in every answer
            if log is not None:
                log.write(samples[-1])

    thread = Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def wait_until_idle(server: ServerProcess, seconds: float = DRAIN_SECONDS) -> ServerState:
    """The server's state when nothing is left in it, or after ``seconds`` as it is then."""
    deadline = time.monotonic() + seconds
    while True:
        state = read_state(server)
        if state.is_idle or time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def find_problems(run: SoakRun, allowed_growth: float | None = None) -> list[str]:
    """What is wrong with a run, in words.

    Args:
        allowed_growth: of a process's memory, in MiB; None: not looked at.
    """
    problems = list(run.tally.examples)
    if not run.end.is_idle:
        problems.append(
            f"left in the server: {run.end.running} running, {run.end.waiting} waiting, "
            f"{run.end.blocks_in_use} KV blocks in use"
        )
    for role, memory in run.end.memory.items():
        growth = memory - run.start.memory.get(role, 0.0)
        if allowed_growth is not None and growth > allowed_growth:
            problems.append(f"{role}: memory grew by {growth:.0f} MiB")
    return problems


def table(run: SoakRun) -> str:
    """The closing table, in Markdown."""
    tally, start, end = run.tally, run.start, run.end
    waiting = [sample.waiting for sample in run.samples] or [0]
    used = [sample.blocks_in_use for sample in run.samples] or [0]
    rows = [
        ("minutes at full load", f"{run.seconds / 60:.1f}"),
        ("requests", f"{tally.requests}"),
        ("of these streamed", f"{tally.streamed}"),
        ("of these left by the client in the middle", f"{tally.left}"),
        ("tokens received", f"{tally.tokens}"),
        ("waiting for KV blocks, on average", f"{sum(waiting) / len(waiting):.0f}"),
        ("KV blocks in use, on average", f"{sum(used) / len(used):.0f} of {end.blocks}"),
        ("failures", f"{tally.failures}"),
        ("answers that differ from the same request alone", f"{tally.wrong}"),
        ("tokens lost / added or doubled", f"{tally.lost} / {tally.added}"),
    ]
    for role, memory in end.memory.items():
        first = start.memory.get(role, 0.0)
        rows.append((f"memory of the {role}, start and end", f"{first:.0f} and {memory:.0f} MiB"))
    for role, count in end.open_files.items():
        first = start.open_files.get(role, 0)
        rows.append((f"open files of the {role}, start and end", f"{first} and {count}"))
    rows.append(("requests running and waiting at the end", f"{end.running} and {end.waiting}"))
    rows.append(("KV blocks in use at the end", f"{end.blocks_in_use} of {end.blocks}"))
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
