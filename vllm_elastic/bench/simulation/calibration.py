# SPDX-License-Identifier: Apache-2.0
"""The simulator against the real engine on this machine: fit on some settings, check on others."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from vllm_elastic.bench.compare import load_problems
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.model_config import shape_of
from vllm_elastic.bench.simulation.batch import Capacity
from vllm_elastic.bench.simulation.cluster import run_closed
from vllm_elastic.bench.simulation.cost_model import CostModel
from vllm_elastic.bench.simulation.device import PARTS, Device
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.bench.simulation.recording import Floats, Recording
from vllm_elastic.bench.simulation.replica import Replica

POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "dual-cache": {},
    "interval": {},
    "elastic, paper": {"elastic_statistic": "paper"},
    "elastic-block": {},
}
BATCH_SIZES = (1, 4, 16)
FITTED = (("none", 4), ("interval", 4), ("elastic, paper", 4))
"""Settings whose steps the overheads are fitted on; every other one is a check.

They tell the costs apart: whole canvases, windows without statistics, windows with them.
"""

CANVAS = 256

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Seconds of this process on a processor are about those of a machine that does nothing else."""


@dataclass
class Timed:
    """One setting's runs on the engine.

    Attributes:
        rows: of each step; seconds: [repeats][steps].
        results: of the last run.
    """

    policy: str
    batch_size: int
    rows: list[int] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_fitted(self) -> bool:
        return (self.policy, self.batch_size) in FITTED

    @property
    def totals(self) -> list[float]:
        """Seconds of all steps of each repeat."""
        return [sum(steps) for steps in self.seconds]

    @property
    def tokens(self) -> int:
        return sum(len(result["token_ids"]) for result in self.results)


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Time the engine, fit, predict every setting; prints and returns what was found.

    Raises:
        SystemExit: processor time is asked for, which several threads would spend at once.
    """
    batch_sizes = args.batch_size or BATCH_SIZES
    batch_sizes = sorted({*batch_sizes, *(batch for _, batch in FITTED)})
    engine = BenchEngine(
        args.model,
        batch_size=max(batch_sizes),
        row_budget=args.max_num_batched_tokens,
        rows=True,
    )
    if args.clock == "cpu" and (threads := _threads()) > 1:
        raise SystemExit(f"--clock cpu needs one thread, not {threads}: OMP_NUM_THREADS=1")
    problems = list(load_problems(args.model, args.problems, CANVAS, 0))
    settings = [Timed(*pair) for pair in itertools.product(POLICIES, batch_sizes)]
    engine.run([{**problem, "elastic_policy": "elastic"} for problem in problems])  # warm-up
    clock = CLOCKS[args.clock]
    for number in range(args.repeats):
        for setting in settings:
            time_setting(engine, problems, setting, clock)
            where = f"repeat {number + 1} of {args.repeats}: {setting.policy}, batch"
            print(f"{where} {setting.batch_size}: {setting.totals[-1]:.1f} s", file=sys.stderr)
    shape = shape_of(args.model, bytes_per_number=4)
    return report(shape, measured_device(shape, clock), settings, capacity_of(engine))


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def time_setting(
    engine: BenchEngine,
    problems: Sequence[dict[str, Any]],
    setting: Timed,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Serve the problems once and keep what each step took."""
    policy = setting.policy.split(",")[0]
    knobs = {"elastic_policy": policy, **POLICIES[setting.policy]}
    scheduler, llm_engine = engine.scheduler, engine.llm.llm_engine
    plan_step: Callable[[], list[Any]] = scheduler._plan_step
    engine_step: Callable[[], Any] = llm_engine.step
    planned: list[int] = []
    seconds: list[float] = []

    def plan() -> list[Any]:
        plans = plan_step()
        planned.append(sum(plan.num_rows for plan in plans))
        return plans

    def step() -> Any:
        started = clock()
        try:
            return engine_step()
        finally:
            seconds.append(clock() - started)

    scheduler.max_num_active_reqs = setting.batch_size
    scheduler._plan_step, llm_engine.step = plan, step
    try:
        setting.results = engine.run([{**problem, **knobs} for problem in problems])
    finally:
        del scheduler._plan_step, llm_engine.step
    # A step without rows only tells the worker who is finished.
    setting.rows = [rows for rows in planned if rows]
    setting.seconds.append([s for s, rows in zip(seconds, planned, strict=True) if rows])


def measured_device(shape: ModelShape, clock: Callable[[], float]) -> Device:
    """Rates of this process: a product of the MLP's shape in float32, and a large copy."""
    import torch

    x = torch.randn(256, shape.width)
    weight = torch.randn(2 * shape.mlp, shape.width)
    large = torch.empty(1 << 25)  # 128 MiB, far more than a cache holds
    product = _median_seconds(lambda: torch.nn.functional.linear(x, weight), 200, clock)
    copy = _median_seconds(lambda: large.clone(), 10, clock)
    flops = 2 * x.numel() * weight.shape[0] / product
    return Device("this machine", flops, flops, 2 * 4 * large.numel() / copy, memory=0.0)


def _median_seconds(function: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(repeats):
        started = clock()
        function()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def capacity_of(engine: BenchEngine) -> Capacity:
    """The engine's capacity, for its largest batch."""
    scheduler = engine.scheduler
    return Capacity(
        seats=scheduler.max_num_active_reqs,
        blocks=engine.num_blocks,
        block_size=scheduler.block_size,
        limits=scheduler.limits,
    )


def fit(device: Device, cost: CostModel, work: Floats, seconds: Floats) -> Device:
    """Overheads, and what each part takes relative to the rates, from timed steps.

    Least squares with no negative coefficient. A step's error is taken to grow with the root of
    its seconds, as the error of a sum does; else whole canvases alone would decide.

    Args:
        work: [steps, columns]; seconds: [steps].
    """
    parts = cost.work_seconds(work).sum(axis=-1)
    columns = np.concatenate([cost.host_counts(work), parts], axis=1)
    weights = seconds**-0.5
    found = non_negative_least_squares(columns * weights[:, None], seconds * weights).tolist()
    return Device(
        device.name,
        device.flops,
        device.float32_flops,
        device.bandwidth,
        device.memory,
        step_seconds=found[0],
        layer_seconds=found[1],
        pass_seconds=found[2],
        statistics_seconds=found[3],
        factors=dict(zip(PARTS, found[4:], strict=True)),
    )


def non_negative_least_squares(columns: Floats, wanted: Floats) -> Floats:
    """x >= 0 that minimises |columns x - wanted|, by trying every set of columns.

    Exact, and quick for a dozen columns: the optimum is the plain solution for the columns that
    take part in it.

    Args:
        columns: [rows, n]; wanted: [rows].
    """
    scale = np.linalg.norm(columns, axis=0)
    scale[scale == 0] = 1.0
    scaled = columns / scale
    products, target = scaled.T @ scaled, scaled.T @ wanted
    best, least = np.zeros(columns.shape[1]), 0.0
    for taken in itertools.product((False, True), repeat=columns.shape[1]):
        chosen = np.flatnonzero(taken)
        if not chosen.size:
            continue
        x = np.zeros(columns.shape[1])
        x[chosen] = np.linalg.lstsq(products[np.ix_(chosen, chosen)], target[chosen])[0]
        loss = x @ products @ x - 2 * x @ target  # squared error but for a constant
        if (x >= 0).all() and loss < least:
            best, least = x, loss
    return best / scale


def report(
    shape: ModelShape, device: Device, settings: Sequence[Timed], capacity: Capacity
) -> dict[str, Any]:
    """Fit, predict, compare; prints the table.

    Returns:
        ``device`` as fitted and ``settings``, one row each.

    Raises:
        RuntimeError: a simulated step has other rows than the engine's.
    """
    simulated = {}
    for setting in settings:
        replica = replay(shape, device, setting, capacity)
        last_layer = replica.cost.columns.rows.stop - 1
        rows = [int(work[last_layer]) for work in replica.steps]
        if rows != setting.rows:
            raise RuntimeError(f"{setting.policy}, batch {setting.batch_size}: other steps")
        simulated[setting.policy, setting.batch_size] = np.array(replica.steps)
    fitted = [setting for setting in settings if setting.is_fitted]
    work = np.concatenate([simulated[s.policy, s.batch_size] for s in fitted])
    seconds = np.concatenate([np.median(s.seconds, axis=0) for s in fitted])
    device = fit(device, CostModel(shape, device), work, seconds)
    print(
        f"\nproducts at {device.flops / 1e9:.1f} GFLOP/s, memory at {device.bandwidth / 1e9:.1f} "
        f"GB/s; fitted: {1e6 * device.step_seconds:.0f} us a step, "
        f"{1e6 * device.layer_seconds:.0f} us a layer, {1e6 * device.pass_seconds:.0f} us a pass, "
        f"{1e6 * device.statistics_seconds:.0f} us for a pass's statistics; times the rates: "
        + ", ".join(f"{part} {factor:.2f}" for part, factor in device.factors.items())
    )
    print("\n| policy | batch | steps | predicted | measured tokens/s | spread | error | |")
    print("|---" * 8 + "|")
    table: list[dict[str, Any]] = []
    for setting in settings:
        replica = replay(shape, device, setting, capacity)
        measured = statistics.median(setting.totals)
        error = measured / replica.busy.seconds - 1
        row = {
            "policy": setting.policy,
            "batch_size": setting.batch_size,
            "steps": replica.busy.steps,
            "predicted_tokens_per_second": setting.tokens / replica.busy.seconds,
            "measured_tokens_per_second": setting.tokens / measured,
            "spread": (max(setting.totals) - min(setting.totals)) / measured,
            "error": error,
            "fitted": setting.is_fitted,
        }
        table.append(row)
        print(
            f"| {setting.policy} | {setting.batch_size} | {row['steps']} | "
            f"{row['predicted_tokens_per_second']:.1f} | "
            f"{row['measured_tokens_per_second']:.1f} | {row['spread']:.0%} | {error:+.1%} | "
            f"{'fitted' if setting.is_fitted else 'check'} |"
        )
    errors = [abs(row["error"]) for row in table if not row["fitted"]]
    print(
        f"\n{len(errors)} settings that were not fitted: mean error {statistics.mean(errors):.1%}, "
        f"largest {max(errors):.1%}. Spread: of the repeats, (slowest - fastest) / median."
    )
    return {"device": asdict(device), "settings": table}


def replay(shape: ModelShape, device: Device, setting: Timed, capacity: Capacity) -> Replica:
    """Serve a setting's requests on a simulated engine with its batch size."""
    recording = Recording(setting.policy, setting.results, shape.layers)
    limits = replace(capacity, seats=setting.batch_size)
    replica = Replica(recording, CostModel(shape, device), limits, keep_steps=True)
    run_closed(replica, recording.requests)
    return replica
