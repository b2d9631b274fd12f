# SPDX-License-Identifier: Apache-2.0
"""What the host takes between two passes: results taken in, the next pass planned and laid out."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from vllm_elastic.bench.arguments import (
    add_engine,
    add_json,
    add_model,
    add_prompts,
    positive,
)
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.bench.served_model import served_model
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.engine.optimisations import MOST_ROWS_OF_A_WHOLE_PASS
from vllm_elastic.models.rows import bucket
from vllm_elastic.runner.executor import WholePassExecutor
from vllm_elastic.runner.graphed_pass import (
    MOST_REQUESTS,
    AllQueries,
    GraphedPasses,
    PassInputs,
)

Floats = npt.NDArray[np.float64]

PARTS = ("planning", "laying out", "taking in results")
"""``schedule``, ``ElasticRunner.start`` up to its upload, ``update_from_output``; vLLM's own share
of the first and the last is in them."""


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Serves prompts and keeps what every pass reports; then serves them again and "
        "again with these results in place of passes, so that the host is as warm as beside a GPU. "
        "Of each step's times the least counts, of the steps their mean. At last what the steps of "
        "all batch sizes say of a step, of a request's pass and of what it measured, for `bench "
        "simulate`. Run it on a machine that does nothing else."
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 16, 64], metavar="N")
    parser.add_argument(
        "--count", type=positive, default=None, help="prompts (default: 2 a seat, at least 16)"
    )
    parser.add_argument("--repeats", type=positive, default=7)
    parser.add_argument(
        "--whole-passes",
        action="store_true",
        help="lay passes out as graphs of whole ones take them, which there are on GPUs only",
    )
    add_engine(parser)
    add_json(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row for each batch size, and write the figures."""
    prompts = list(read_jsonl(args.prompts))
    engine = served_model(args, prompts, max(args.batch_size))
    print(f"| seats | requests a step | {', ms | '.join(PARTS)}, ms | together, ms |")
    print("|---" * (3 + len(PARTS)) + "|")
    rows, counts, seconds = [], [], []
    for seats in args.batch_size:
        asked = prompts[: args.count or max(16, 2 * seats)]
        engine.scheduler.max_num_active_reqs = seats
        kept = _results(engine, asked)
        executor = _whole_passes(engine.runner) if args.whole_passes else engine.runner._executor
        with patch.object(engine.runner, "_executor", executor):
            times = host_time(engine, asked, kept, args.repeats)
        counts.append(_counts(kept))
        seconds.append(sum(times.values()))
        row = {part: 1e3 * float(of_steps.mean()) for part, of_steps in times.items()}
        row |= {"together": sum(row.values()), "requests": float(counts[-1][:, 1].mean())}
        rows.append(row | {"seats": seats})
        shown = " | ".join(f"{row[part]:.3f}" for part in PARTS)
        print(f"| {seats} | {row['requests']:.1f} | {shown} | {row['together']:.2f} |", flush=True)
    fitted = _fit(np.concatenate(counts), np.concatenate(seconds))
    print("\n" + ", ".join(f"{each}: {1e6 * cost:.0f} us" for each, cost in fitted.items()))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def _whole_passes(runner: Any) -> WholePassExecutor:
    """It lays out, and has no graphs to run."""
    width = runner.cache.table_width(runner.model_config.max_model_len)
    inputs = PassInputs(runner.device, MOST_ROWS_OF_A_WHOLE_PASS, MOST_REQUESTS, width)
    queries = AllQueries(runner.model, MOST_ROWS_OF_A_WHOLE_PASS, range(runner.traits.num_layers))
    passes = GraphedPasses(runner.model, inputs, queries)
    counts = map(bucket, range(1, MOST_ROWS_OF_A_WHOLE_PASS + 1))
    passes._graphs = dict.fromkeys(counts)  # type: ignore[assignment]
    return WholePassExecutor(passes, runner._executor)


def host_time(
    engine: BenchEngine, asked: Sequence[dict[str, Any]], kept: list[list[PassResult]], repeats: int
) -> dict[str, Floats]:
    """Seconds of each step's parts, [steps], the least of all repeats."""
    times = [_replayed(engine, asked, kept) for _ in range(repeats)]
    return {part: np.min([each[part] for each in times], axis=0) for part in PARTS}


def _counts(kept: list[list[PassResult]]) -> Floats:
    """[steps, 3]: each step's 1, its passes, and those that measured."""
    measured = [sum(result.measured is not None for result in results) for results in kept]
    return np.array(
        [(1, len(results), n) for results, n in zip(kept, measured, strict=True)], float
    )


def _fit(counts: Floats, seconds: Floats) -> dict[str, float]:
    """Seconds of each of the three, by least squares; large steps vary more and weigh less."""
    weights = counts[:, 1] ** -0.5
    found = np.linalg.lstsq(counts * weights[:, None], seconds * weights, rcond=None)[0]
    return dict(zip(("a step", "a pass", "what it measured"), found.tolist(), strict=True))


def _results(engine: BenchEngine, asked: Sequence[dict[str, Any]]) -> list[list[PassResult]]:
    """Of every pass, in their order."""
    run, kept = engine.runner.run, []

    def keep(plans: list[PassPlan]) -> Any:
        kept.append(run(plans))
        return kept[-1]

    with patch.object(engine.runner, "run", keep):
        engine.run(asked)
    return kept


def _replayed(
    engine: BenchEngine, asked: Sequence[dict[str, Any]], kept: list[list[PassResult]]
) -> dict[str, Floats]:
    """Seconds of each step's parts, [steps]."""
    runner, scheduler, results = engine.runner, engine.scheduler, iter(kept)
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args)
            finally:
                seconds[part].append(time.perf_counter() - started)

        return wrapper

    planning, laying_out, taking_in = PARTS
    start = timed(laying_out, runner.start)

    def run(plans: list[PassPlan]) -> list[PassResult]:
        with contextlib.suppress(_LaidOutError):
            start(plans)
        return next(results)

    with (
        patch.object(runner, "run", run),
        patch.object(runner._upload, "send", _stop),
        patch.object(scheduler, "schedule", timed(planning, scheduler.schedule)),
        patch.object(
            scheduler, "update_from_output", timed(taking_in, scheduler.update_from_output)
        ),
    ):
        engine.run(asked)
    found = {part: np.array(of_steps) for part, of_steps in seconds.items()}
    assert {len(of_steps) for of_steps in found.values()} == {len(kept)}, "a step without a pass"
    return found


class _LaidOutError(Exception):
    """A pass is laid out, and goes no further."""


def _stop() -> None:
    raise _LaidOutError


if __name__ == "__main__":
    main(make_parser().parse_args())
