# SPDX-License-Identifier: Apache-2.0
"""``bench simulate``: what recorded runs would take on another device, model depth and scale."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import positive
from vllm_elastic.bench.engine import DEFAULT_ROW_BUDGET
from vllm_elastic.bench.model_config import shape_of
from vllm_elastic.bench.rank_memory import GIB, Setting, rank_memory
from vllm_elastic.bench.simulation.batch import Capacity
from vllm_elastic.bench.simulation.cluster import ROUTERS, Outcome, closed_loop, open_loop
from vllm_elastic.bench.simulation.cost_model import CostModel, WholePasses
from vllm_elastic.bench.simulation.device import DEVICES, Device
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.bench.simulation.recording import KINDS, Recording
from vllm_elastic.bench.simulation.replica import Replica
from vllm_elastic.config import BLOCK_SIZE, ElasticConfig
from vllm_elastic.models.rows import bucket

BATCH_SIZES = (1, 16, 256)

DESCRIPTION = """\
Replays files of `bench run` on a virtual clock: the same passes of the same requests, batched by
the scheduler's own code, each step timed by a cost model of a GPU. The figures are predictions;
nothing of this project was measured on a GPU. Rows, windows, denoising steps and canvases are
taken as recorded; a pass's join layer keeps its relative depth (layer 3 of 8 becomes 12 of 32).
With --calibrate the model is held against the real engine on this machine instead.
"""


def add_parser(commands: Any) -> None:
    """Add ``simulate`` to the command line."""
    parser = commands.add_parser(
        "simulate",
        help="predict tokens/s and latency of recorded runs on other devices and clusters",
        description=DESCRIPTION,
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="files of `bench run`")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--batch-size",
        nargs="+",
        type=positive,
        default=None,
        metavar="N",
        help="requests at a time of a replica (default: 1 16 256; with --calibrate 1 4 16)",
    )
    load.add_argument("--replicas", nargs="+", type=positive, default=[1], metavar="N")
    load.add_argument(
        "--requests",
        type=positive,
        default=None,
        metavar="N",
        help="of each replica (default: 8 batches, at least 64)",
    )
    load.add_argument(
        "--rate",
        type=_rate,
        default=None,
        metavar="R",
        help="Poisson arrivals, requests a second and replica; default: a closed loop that "
        "keeps every batch full until the requests run out",
    )
    load.add_argument("--router", choices=ROUTERS, default="least-outstanding")
    load.add_argument(
        "--sample",
        type=positive,
        default=16,
        metavar="N",
        help="simulate at most so many replicas, for all of them (default: %(default)s)",
    )
    load.add_argument("--seed", type=int, default=0)
    model = parser.add_argument_group("model and engine")
    model.add_argument(
        "--model-config",
        type=Path,
        default=None,
        metavar="FILE",
        help="of any family that is served (default: LLaDA-8B)",
    )
    model.add_argument("--max-num-batched-tokens", type=int, default=DEFAULT_ROW_BUDGET)
    model.add_argument(
        "--async-scheduling", action="store_true", help="two groups of requests take turns"
    )
    model.add_argument(
        "--whole-passes",
        action="store_true",
        help="graphs of whole passes, as with cudagraph_mode FULL",
    )
    model.add_argument(
        "--block-size",
        type=positive,
        default=BLOCK_SIZE,
        metavar="N",
        help="positions of a KV block (default: %(default)s, the engine's)",
    )
    device = parser.add_argument_group("device (predictions, untested)")
    device.add_argument("--device", choices=list(DEVICES), default="h100")
    device.add_argument("--tflops", type=float, help="dense bfloat16")
    device.add_argument("--float32-tflops", type=float, help="of the attention statistics")
    device.add_argument("--bandwidth-gb", type=float, help="GB/s")
    device.add_argument("--memory-gib", type=float)
    device.add_argument(
        "--memory-utilization", type=float, default=0.9, help="share for the engine"
    )
    device.add_argument("--efficiency", type=float, help="share of both peaks that is reached")
    device.add_argument("--step-overhead-us", type=float, help="host time of a step")
    device.add_argument("--layer-overhead-us", type=float, help="host time of a layer")
    device.add_argument("--pass-overhead-us", type=float, help="host time of a request's pass")
    device.add_argument(
        "--statistics-overhead-us", type=float, help="host time of a request's statistics"
    )
    check = parser.add_argument_group("check against this machine")
    check.add_argument("--calibrate", action="store_true")
    check.add_argument("--model", type=Path, metavar="DIR", help="checkpoint with a heldout.py")
    check.add_argument("--problems", type=positive, default=32, metavar="N")
    check.add_argument("--repeats", type=positive, default=3, metavar="N")
    check.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: this process's processor time, for a rough figure on a machine that is shared",
    )
    parser.set_defaults(function=main)


def _rate(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def main(args: argparse.Namespace) -> None:
    """Print one table row for each run file, batch size and number of replicas."""
    if args.calibrate:
        if args.model is None or args.runs:
            raise SystemExit("--calibrate needs --model DIR, and no run files: it makes its own")
        from vllm_elastic.bench.simulation import calibration

        found: Any = calibration.calibrate(args)
    else:
        if not args.runs:
            raise SystemExit("name at least one file of `bench run`, or --calibrate --model DIR")
        found = predict(args)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


def predict(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate every setting; prints and returns the table's rows."""
    shape = ModelShape()
    if args.model_config is not None:
        shape = shape_of(args.model_config)
    device = device_of(args)
    cost = CostModel(shape, device, whole_passes() if args.whole_passes else WholePasses())
    recordings = [Recording.read(path, shape.layers) for path in args.runs]
    print(f"Predicted for {device.name}, not measured; {shape.layers} layers of {shape.width}.\n")
    print(
        "| run | batch | fit | replicas | tokens/s each | tokens/s all | latency median, s | "
        f"p99, s | {', '.join(KINDS)} | bound by |"
    )
    print("|---" * 10 + "|", flush=True)
    rows = []
    batch_sizes = args.batch_size or BATCH_SIZES
    for recording, batch_size in itertools.product(recordings, batch_sizes):
        capacity = capacity_of(shape, device, recording, batch_size, args)
        for replicas in args.replicas:
            outcome = simulate(recording, cost, capacity, replicas, args)
            row = {
                "run": recording.name,
                "device": device.name,
                "batch_size": batch_size,
                "canvases_that_fit": canvases_that_fit(recording, capacity),
                "rate": args.rate,
                **outcome.summary(),
            }
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def whole_passes() -> WholePasses:
    """The whole passes that an engine has graphs of."""
    from vllm_elastic.engine.optimisations import MOST_ROWS_OF_A_WHOLE_PASS
    from vllm_elastic.runner.graphed_pass import MOST_REQUESTS

    return WholePasses(MOST_ROWS_OF_A_WHOLE_PASS, MOST_REQUESTS)


def device_of(args: argparse.Namespace) -> Device:
    """The chosen device with what the command line overrides."""
    given = {
        "flops": (args.tflops, 1e12),
        "float32_flops": (args.float32_tflops, 1e12),
        "bandwidth": (args.bandwidth_gb, 1e9),
        "memory": (args.memory_gib, float(1 << 30)),
        "efficiency": (args.efficiency, 1.0),
        "step_seconds": (args.step_overhead_us, 1e-6),
        "layer_seconds": (args.layer_overhead_us, 1e-6),
        "pass_seconds": (args.pass_overhead_us, 1e-6),
        "statistics_seconds": (args.statistics_overhead_us, 1e-6),
    }
    changes: dict[str, Any] = {
        name: value * unit for name, (value, unit) in given.items() if value is not None
    }
    return replace(DEVICES[args.device], **changes)


def capacity_of(
    shape: ModelShape,
    device: Device,
    recording: Recording,
    batch_size: int,
    args: argparse.Namespace,
) -> Capacity:
    """What fits, as ``bench plan`` works it out.

    Raises:
        SystemExit: the weights do not fit, or some recorded canvas does not; says by how much.
    """
    from vllm_elastic.engine.optimisations import most_rows  # imports vLLM: seconds

    row_budget = max(args.max_num_batched_tokens, batch_size)  # vLLM wants a row a request
    longest = max(request.canvas for request in recording.requests)
    setting = Setting(
        shape=shape,
        ranks=1,
        memory=int(device.memory),
        utilization=args.memory_utilization,
        hidden_stride=ElasticConfig().hidden_stride,
        canvas=longest,
        row_budget=row_budget,
        seats=batch_size,
        window=recording.window,
        max_window=max(recording.window, ElasticConfig().max_window),
        block_size=args.block_size,
        graph_rows=bucket(most_rows(None, row_budget)),
        whole_rows=whole_passes().rows if args.whole_passes else 0,
    )
    found = rank_memory(setting)
    if not found.canvases:
        raise SystemExit(
            f"{device.name}: {found.left / GIB:.1f} GiB are left for canvases at batch size "
            f"{batch_size}; one of {longest} positions takes "
            f"{longest * found.position / GIB:.1f} GiB"
        )
    return Capacity(
        seats=batch_size,
        blocks=found.positions // args.block_size,
        block_size=args.block_size,
        limits=setting.limits,
        in_flight=2 if args.async_scheduling else 1,
    )


def canvases_that_fit(recording: Recording, capacity: Capacity) -> int:
    """How many canvases of the mean size fit."""
    sizes = [capacity.blocks_of(request.canvas) for request in recording.requests]
    return int(capacity.blocks * len(sizes) / sum(sizes))


def simulate(
    recording: Recording,
    cost: CostModel,
    capacity: Capacity,
    replicas: int,
    args: argparse.Namespace,
) -> Outcome:
    """Simulate one setting, in a closed loop or with arrivals."""

    def make_replica() -> Replica:
        return Replica(recording, cost, capacity)

    requests = args.requests or max(64, 8 * capacity.seats)
    if args.rate is None:
        return closed_loop(
            make_replica,
            recording,
            replicas=replicas,
            sample=args.sample,
            requests=requests,
            seed=args.seed,
        )
    return open_loop(
        make_replica,
        recording,
        replicas=replicas,
        sample=args.sample,
        requests=requests,
        rate=args.rate,
        router=args.router,
        seed=args.seed,
    )


def _line(row: dict[str, Any]) -> str:
    kinds = ", ".join(f"{row['kinds'][kind]:.0%}" for kind in KINDS)
    bound, share = next(iter(row["shares"].items()))
    return (
        f"| {row['run']} | {row['batch_size']} | {row['canvases_that_fit']} | {row['replicas']} | "
        f"{row['tokens_per_second_and_replica']:.0f} | {row['tokens_per_second']:.0f} | "
        f"{row['latency_median']:.2f} | {row['latency_p99']:.2f} | {kinds} | "
        f"{bound} {share:.0%} |"
    )
