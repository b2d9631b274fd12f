# SPDX-License-Identifier: Apache-2.0
"""``fuzz``: malformed and odd requests to a server that answers good ones meanwhile."""

from __future__ import annotations

import argparse
import collections
import json
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.exchange import Answer, Ask, exchange
from tests.reliability.server_state import ServerState
from tests.reliability.soak import POSITIONS, TINY_LLADA, wait_until_idle
from tests.reliability.stock_errors import stock_error
from tests.reliability.traffic import Load, Tally, ask_again, ask_alone, mixed_asks
from vllm_elastic.bench.server import ServerProcess

HANG_SECONDS = 120.0

SERVER_LIMITS = {"VLLM_MAX_N_SEQUENCES": "8"}
"""Environment of the server: vLLM's limit of 16,384 copies is legal, and takes for ever."""


def add_parser(commands: Any) -> None:
    """Add ``fuzz`` to the command line."""
    parser = commands.add_parser(
        "fuzz",
        help="malformed requests to a server: 4xx, and good answers unchanged",
        description="Starts `vllm serve` and sends malformed and odd but legal requests, drawn "
        "by Hypothesis and Schemathesis from the server's OpenAPI description and from what means "
        "something to LLaDA, while other clients ask good ones. Needs the group `dev`.",
    )
    parser.add_argument("--model", type=Path, default=TINY_LLADA, metavar="DIR")
    parser.add_argument("--requests", type=int, default=5000, metavar="N", help="bad ones")
    parser.add_argument("--clients", type=int, default=2, metavar="N", help="of good requests")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=32 << 20, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(function=main)


def main(args: argparse.Namespace) -> None:
    """Run the fuzzer, print the closing table, write failures and the server's log.

    Raises:
        SystemExit: a request failed the server, or a good one's answer changed.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    options = ["--dtype", "float32", "--max-model-len", str(POSITIONS)]
    options += ["--kv-cache-memory-bytes", str(args.kv_cache_memory_bytes)]
    options += ["--served-model-name", "tiny"]
    log = args.out / "server.log"
    with ServerProcess(args.model, options, log=log, env=SERVER_LIMITS) as server:
        print(server.command_line, flush=True)
        asks = mixed_asks(40, args.model, args.seed)
        right = ask_alone(server.address, asks)
        images = "image_token_id" in (args.model / "config.json").read_text()
        run = fuzz(
            server,
            asks,
            right,
            args.requests,
            clients=args.clients,
            seed=args.seed,
            images=images,
        )
    (args.out / "failures.jsonl").write_text("".join(f"{line}\n" for line in run.failures))
    print(table(run))
    problems = find_problems(run)
    if problems:
        raise SystemExit("\n".join(["FAILED", *problems[:20]]))


@dataclass
class FuzzRun:
    """What came of it.

    Attributes:
        statuses: answers to bad requests by status; 0: none came.
        by_path: bad requests by endpoint.
        stock: 5xx of stock vLLM by name.
        failures: every other answer that is neither 2xx nor 4xx, with its request, as JSON.
        good: the good requests meanwhile; after: the same alone afterwards.
        start, end: the idle server before and after.
    """

    start: ServerState
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    by_path: collections.Counter[str] = field(default_factory=collections.Counter)
    stock: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[str] = field(default_factory=list)
    good: Tally = field(default_factory=Tally)
    after: Tally = field(default_factory=Tally)
    end: ServerState | None = None
    is_up: bool = False

    def count(self, ask: Ask, answer: Answer) -> None:
        """Take in the answer to a bad request."""
        self.statuses[answer.status] += 1
        self.by_path[ask.path] += 1
        if 200 <= answer.status < 300 or 400 <= answer.status < 500:
            return
        known = stock_error(ask, answer)
        if known is not None:
            self.stock[known.name] += 1
            return
        body = ask.body if not isinstance(ask.body, bytes) else repr(ask.body[:2000])
        self.failures.append(
            json.dumps(
                {
                    "status": answer.status,
                    "error": answer.error,
                    "path": ask.path,
                    "content_type": ask.content_type,
                    "body": body,
                }
            )
        )


def fuzz(
    server: ServerProcess,
    asks: Sequence[Ask],
    right: Sequence[Answer],
    requests: int,
    *,
    clients: int = 2,
    seed: int = 0,
    images: bool = False,
) -> FuzzRun:
    """Send ``requests`` bad requests one by one while ``clients`` ask good ones.

    Args:
        images: the model takes them, so half of the bad requests have some.

    Raises:
        SystemExit: Hypothesis or Schemathesis is not installed.
    """
    try:
        import hypothesis

        from tests.reliability.malformed import malformed_asks
    except ImportError as error:
        raise SystemExit(f"{error}: fuzz needs the dependency group `dev`") from None
    with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=60) as answer:
        openapi = json.load(answer)
    run = FuzzRun(wait_until_idle(server))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=requests,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(malformed_asks(openapi, images))
    def send(ask: Ask) -> None:
        # Hypothesis repeats an example now and then; up to `requests` different ones are sent.
        run.count(ask, exchange(server.address, ask, HANG_SECONDS))

    with Load(server.address, asks, right, clients=clients, seed=seed) as load:
        send()
    run.good = load.tally
    run.is_up = server.is_running()
    run.end = wait_until_idle(server)
    run.after = ask_again(server.address, asks, right)
    return run


def find_problems(run: FuzzRun) -> list[str]:
    """What is wrong, in words; empty when the server stood it."""
    problems = [] if run.is_up else ["the server ended"]
    problems += run.failures
    problems += run.good.examples + run.after.examples
    if run.end is None or not run.end.is_idle:
        problems.append(f"left in the server: {run.end}")
    return problems


def table(run: FuzzRun) -> str:
    """The closing table, in Markdown."""
    sent = sum(run.statuses.values())
    answered = {hundred: 0 for hundred in (2, 4, 5)}
    for status, count in run.statuses.items():
        answered[status // 100] = answered.get(status // 100, 0) + count
    end = run.end or run.start
    rows = [
        ("malformed or odd requests", f"{sent} to {len(run.by_path)} paths"),
        ("answered 2xx (odd but legal)", f"{answered[2]}"),
        ("answered 4xx", f"{answered[4]}"),
        ("known 5xx of stock vLLM", f"{sum(run.stock.values())}"),
        ("failures: other 5xx, no answer", f"{len(run.failures)}"),
        ("good requests meanwhile", f"{run.good.requests}"),
        ("of these failed", f"{run.good.failures}"),
        ("of these with another answer", f"{run.good.wrong}"),
        ("tokens lost / added or doubled", f"{run.good.lost} / {run.good.added}"),
        ("the same alone afterwards, changed", f"{run.after.wrong + run.after.failures}"),
    ]
    for role, memory in end.memory.items():
        first = run.start.memory.get(role, 0.0)
        rows.append((f"memory of the {role}, start and end", f"{first:.0f} and {memory:.0f} MiB"))
    rows.append(("requests running and waiting at the end", f"{end.running} and {end.waiting}"))
    rows.append(("KV blocks in use at the end", f"{end.blocks_in_use} of {end.blocks}"))
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    lines += ["", "By path: " + ", ".join(f"{p} {n}" for p, n in run.by_path.most_common())]
    lines += [f"Stock vLLM: {name}: {count}" for name, count in run.stock.items()]
    return "\n".join(lines)
