# SPDX-License-Identifier: Apache-2.0
"""``bench card``: what passes of each kind take on this device, against what it can do."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from vllm_elastic.bench import machine
from vllm_elastic.bench.arguments import add_json, positive
from vllm_elastic.bench.dummy_model import add_sizes, dummy_engine, shape_of_sizes
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.made_plans import KINDS, PlanMaker
from vllm_elastic.bench.pass_floor import Floor, Rates, measured_rates
from vllm_elastic.bench.pass_parts import PARTS, parts_timed
from vllm_elastic.bench.pass_time import PassTime, clock, time_pass
from vllm_elastic.bench.scheduler_time import scheduler_seconds
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.decoding.round_robin import RoundRobin

DESCRIPTION = """\
Builds a LLaDA with random weights and runs passes of every kind, as the device runs them (by CUDA
graphs, with --whole-passes in both ways; on a CPU by compiled layers) and eagerly, interleaved. A
pass is timed from the upload of its numbers until its results are on their way back; the host gap
is what the device waits between two passes: scheduling, laying out, reading results. The floor is
the longer of a pass's bytes over the bytes a second of a large copy and its floating-point
operations over the rate of a large matrix product, both measured in the same run. A batch of more
rows than a step takes is cut as the scheduler cuts it. Run it on a machine that does nothing else.
"""


def add_parser(commands: Any) -> None:
    """Add ``card`` to the command line."""
    parser = commands.add_parser(
        "card",
        help="time of passes by kind on this device, against the floor of its bytes and operations",
        description=DESCRIPTION,
    )
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 16, 64], metavar="N")
    parser.add_argument(
        "--canvas", nargs="+", type=positive, default=[400, 1100], metavar="T", help="positions"
    )
    parser.add_argument("--window", type=positive, default=ElasticConfig().window)
    parser.add_argument(
        "--refresh-from", type=positive, default=None, help="layer; default: the middle"
    )
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument(
        "--parts", action="store_true", help="once more with each part waited for: where time goes"
    )
    add_json(parser)
    add_sizes(parser)
    parser.set_defaults(function=main)


@dataclass(frozen=True)
class Group:
    """Passes of one kind by one executor; those that take turns are timed with it."""

    executor: str
    kind: str
    plans: list[PassPlan]


def main(args: argparse.Namespace) -> None:
    """Print a row for each kind of pass, canvas, batch size and executor.

    Raises:
        SystemExit: a refresh begins behind the last layer.
    """
    shape = shape_of_sizes(args)
    if args.refresh_from is None:
        args.refresh_from = shape.layers // 2
    if args.refresh_from >= shape.layers:
        raise SystemExit(
            f"--refresh-from {args.refresh_from}: the model has layers 0 to {shape.layers - 1}"
        )
    engine = dummy_engine(shape, args, args.batch_size, max(args.canvas))
    found = machine.machine() | {"dtype": args.dtype}
    rates = measured_rates(args.dtype, engine.runner.device.type)
    rows = measure(engine, shape, rates, args)
    print(
        f"\n{machine.sentence(found)}, {args.dtype}; a product {rates.flops / 1e12:.3g} TFLOP/s, a "
        f"copy {rates.bandwidth / 1e9:.4g} GB/s; {shape.layers} layers of {shape.width}, window "
        f"{args.window}, refresh from layer {args.refresh_from}"
    )
    if args.json is not None:
        found |= {"flops": rates.flops, "bandwidth": rates.bandwidth}
        document = {"machine": found, "passes": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")


def measure(
    engine: BenchEngine, shape: ModelShape, rates: Rates, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time all settings that fit into the engine's KV cache; prints and returns the rows."""
    where = f" of which: {', '.join(PARTS)} |" if args.parts else ""
    print(
        "| executor | canvas | batch | pass | requests | rows | ms | bytes' floor, ms "
        f"| operations' floor, ms | x floor | host gap, ms |{where}"
    )
    print("|---" * (11 + args.parts) + "|", flush=True)
    rows = []
    for canvas, batch in itertools.product(args.canvas, args.batch_size):
        maker = PlanMaker(
            canvas, args.window, args.refresh_from, shape.vocabulary, engine.runner.cache.block_size
        )
        if batch * maker.blocks_of_canvas > engine.num_blocks:
            fit = engine.num_blocks // maker.blocks_of_canvas
            print(f"(batch {batch} of canvas {canvas}: the KV cache holds {fit})", flush=True)
            continue
        scheduling = {
            policy: scheduler_seconds(engine, policy, batch, canvas).together
            for policy in sorted(set(KINDS.values()))
        }
        groups = [
            Group(executor, kind, _of_a_step(engine, [maker.plan(kind, i) for i in range(batch)]))
            for executor in executors(engine.runner)
            for kind in KINDS
        ]
        for group, times in zip(groups, _timed(engine.runner, groups, args.repeats), strict=True):
            row = row_of(group, times, scheduling[KINDS[group.kind]], shape, rates)
            row |= {"canvas": canvas, "batch_size": batch}
            if args.parts:
                row["shares"] = _shares(engine.runner, group, row["scheduling_milliseconds"] / 1e3)
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def executors(runner: Any) -> dict[str, Any]:
    """The ways to run a pass, by name: eagerly, and as the runner does; where that has a way for
    some passes only, the way of the others too."""
    from vllm_elastic.runner.executor import EagerExecutor, WholePassExecutor

    own = runner._executor
    ways = [EagerExecutor(runner.model), own]
    if isinstance(own, WholePassExecutor):
        ways.insert(1, own.others)
    return {each.name: each for each in ways}


def row_of(
    group: Group, times: list[PassTime], scheduling: float, shape: ModelShape, rates: Rates
) -> dict[str, Any]:
    """The medians, and what they are held against.

    Args:
        scheduling: seconds of host time between two passes, which nothing hides.
    """
    device = statistics.median(time.device for time in times)
    gap = statistics.median(time.gap for time in times) + scheduling
    floor = Floor.of(shape, group.plans, rates)
    return {
        "executor": group.executor,
        "pass": group.kind,
        "requests": len(group.plans),
        "rows": sum(plan.num_rows for plan in group.plans),
        "milliseconds": 1e3 * device,
        "bytes_floor_milliseconds": 1e3 * floor.transfer,
        "operations_floor_milliseconds": 1e3 * floor.compute,
        "times_floor": device / floor.seconds,
        "gap_milliseconds": 1e3 * gap,
        "scheduling_milliseconds": 1e3 * scheduling,
    }


def _of_a_step(engine: BenchEngine, plans: list[PassPlan]) -> list[PassPlan]:
    """The plans that the scheduler would put into one step."""
    turns, by_id = RoundRobin(), {plan.request_id: plan for plan in plans}
    for request_id in by_id:
        turns.add(request_id)
    return [plan for _, plan in turns.take(by_id, by_id.__getitem__, engine.scheduler.limits)]


def _timed(runner: Any, groups: list[Group], repeats: int) -> list[list[PassTime]]:
    """The times of each group's pass, group after group, over and over; the first is a warm-up."""
    found: dict[int, list[PassTime]] = defaultdict(list)
    own, ways = runner._executor, executors(runner)
    try:
        for _ in range(repeats + 1):
            for number, group in enumerate(groups):
                runner._executor = ways[group.executor]
                found[number].append(time_pass(runner, group.plans))
    finally:
        runner._executor = own
    return [found[number][1:] for number in range(len(groups))]


def _shares(runner: Any, group: Group, scheduling: float) -> dict[str, float]:
    """Each part's share of a step in which every part is waited for, so that it takes longer."""
    import torch

    own = runner._executor
    runner._executor = executors(runner)[group.executor]
    try:
        with torch.inference_mode(), parts_timed() as parts:
            started = clock()
            runner.run(group.plans)
            whole = clock() - started + scheduling
    finally:
        runner._executor = own
    parts["scheduler"] = scheduling
    shares = {name: parts[name] / whole for name in PARTS}
    return shares | {"other": 1 - sum(shares.values())}


def _line(row: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row.get("shares", {}).items())
    return (
        f"| {row['executor']} | {row['canvas']} | {row['batch_size']} | "
        f"{row['pass']} | {row['requests']} | {row['rows']} | {row['milliseconds']:.2f} | "
        f"{row['bytes_floor_milliseconds']:.2f} | {row['operations_floor_milliseconds']:.2f} | "
        f"{row['times_floor']:.2f} | {row['gap_milliseconds']:.2f} |"
        f"{f' {shares} |' if shares else ''}"
    )
