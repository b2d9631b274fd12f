# SPDX-License-Identifier: Apache-2.0
"""``bench step``: what one pass takes, against the floor that its matrix products set."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.scheduler_time import scheduler_seconds
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import NO_POSITIONS
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest
from vllm_elastic.decoding.plan import PassPlan, Segment

TRACKED = 4  # tracked and just committed rows beside the window
BLOCK_WINDOW = "window, elastic-block"  # as many rows, its statistics


def add_parser(commands: Any) -> None:
    """Add ``step`` to the command line."""
    parser = commands.add_parser(
        "step",
        help="time of a full pass, a window pass and a refresh, against the floor",
        description="Builds a LLaDA with random weights, runs passes of every kind at several "
        "batch sizes, interleaved, and compares their median time with the floating-point "
        "operations of the plan over the best rate of a matrix product in this process, torch's "
        "or the engine's own. Then says where the time goes. The scheduler's time, measured on "
        "requests of the policy, is counted with the pass. Run it on a machine that does nothing "
        "else.",
    )
    parser.add_argument("--width", type=int, default=1024, help="d_model")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--mlp", type=int, default=3072, help="mlp_hidden_size")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--canvas", type=int, default=256, metavar="T", help="positions")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--refresh-from", type=int, default=None, help="layer; default: the middle")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 4, 16], metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")
    parser.set_defaults(function=main)


def operations(shape: ModelShape, plan: PassPlan) -> int:
    """Floating-point operations of a plan's matrix products and attention.

    The last layer finishes the window's rows only, but makes keys and values of all.
    """
    row_layers, window = plan.row_layers(shape.layers), len(plan.window)
    finished = row_layers - plan.num_rows + window
    products = shape.product_operations(row_layers, finished)
    attention = shape.attention_operations(finished * len(plan.tokens))
    return products + attention + shape.head_operations(window)


def main(args: argparse.Namespace) -> None:
    """Print a table of times and, for each kind of pass, where its time goes."""
    import torch

    shape = ModelShape(
        width=args.width,
        key_width=args.width,
        layers=args.layers,
        heads=args.heads,
        mlp=args.mlp,
        vocabulary=args.vocabulary,
    )
    join = args.layers // 2 if args.refresh_from is None else args.refresh_from
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder), args)
    runner = engine.runner
    rows = []
    print(f"| batch | pass | ms | GFLOP | floor, ms | x floor | of which: {', '.join(PARTS)} |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for batch in args.batch_size:
        passes = {
            kind: [make_plan(kind, i, join, runner.cache.block_size, args) for i in range(batch)]
            for kind in ("full", "window", BLOCK_WINDOW, f"from layer {join}")
        }
        product = runner.model.blocks[0].mlp.gate_up_proj
        rates = {
            kind: rate(sum(p.num_rows for p in plans), product, runner.device, args)
            for kind, plans in passes.items()
        }
        for plans in passes.values():  # keys and hidden states for the others, and a warm-up
            runner.run(plans)
        seconds: dict[str, list[float]] = defaultdict(list)
        for _ in range(args.repeats):
            for kind, plans in passes.items():
                started = _clock()
                runner.run(plans)
                seconds[kind].append(_clock() - started)
        scheduling = {
            policy: scheduler_seconds(engine, policy, batch, args.canvas)
            for policy in {_policy_of(kind) for kind in passes}
        }
        for kind, plans in passes.items():
            scheduled = scheduling[_policy_of(kind)]
            with parts_timed() as parts:
                started = _clock()
                runner.run(plans)
                whole = _clock() - started + scheduled
            parts["scheduler"] = scheduled
            median = statistics.median(seconds[kind]) + scheduled
            work = sum(operations(shape, plan) for plan in plans)
            floor = work / rates[kind]
            shares = {name: parts[name] / whole for name in PARTS}
            shares["other"] = 1 - sum(shares.values())
            rows.append(
                {
                    "batch_size": batch,
                    "pass": kind,
                    "rows": sum(p.num_rows for p in plans),
                    "milliseconds": 1e3 * median,
                    "gflop": work / 1e9,
                    "gflops_of_a_product": rates[kind] / 1e9,
                    "floor_milliseconds": 1e3 * floor,
                    "times_floor": median / floor,
                    "shares": shares,
                }
            )
            where = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            print(
                f"| {batch} | {kind} | {1e3 * median:.1f} | {work / 1e9:.2f} | "
                f"{1e3 * floor:.1f} | {median / floor:.2f} | {where} |",
                flush=True,
            )
    print(f"\n{torch.get_num_threads()} thread(s), {args.dtype}")
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def build(folder: Path, args: argparse.Namespace) -> BenchEngine:
    """An engine with random weights whose KV cache holds the largest batch."""
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": args.width,
        "n_heads": args.heads,
        "n_layers": args.layers,
        "mlp_hidden_size": args.mlp,
        "vocab_size": args.vocabulary,
        "max_sequence_length": args.canvas,
        "mask_token_id": args.vocabulary - 1,
        "eos_token_id": args.vocabulary - 2,
        "torch_dtype": args.dtype,
    }
    (folder / "config.json").write_text(json.dumps(config))
    position = 3 * args.layers * args.width * (4 if args.dtype == "float32" else 2)
    return BenchEngine(
        folder,
        dtype=args.dtype,
        batch_size=max(args.batch_size),
        load_format="dummy",
        row_budget=max(args.batch_size) * args.canvas,
        kv_cache_memory_bytes=position * (args.canvas + 128) * (max(args.batch_size) + 2),
    )


def make_plan(
    kind: str, index: int, join: int, block_size: int, args: argparse.Namespace
) -> PassPlan:
    """Request ``index``'s part in a pass: half of its canvas is prompt, the other half masked."""
    length = args.canvas
    everyone = np.arange(length, dtype=np.int32)
    masked = everyone >= length // 2
    window = everyone[masked][: args.window]
    tracked = everyone[: length // 2 : max(1, length // 2 // TRACKED)][:TRACKED]
    window_rows = [Segment(0, np.union1d(window, tracked).astype(np.int32))]
    segments = {
        "full": [Segment(0, everyone)],
        "window": window_rows,
        BLOCK_WINDOW: window_rows,
    }.get(kind, [Segment(join, everyone)])
    blocks = -(-length // block_size)
    generator = np.random.default_rng(index)
    tokens = generator.integers(0, args.vocabulary - 2, length, dtype=np.int32)
    tokens[masked] = args.vocabulary - 1
    plan = PassPlan(
        request_id=str(index),
        kind=kind,
        denoising_step=0,
        segments=segments,
        tokens=tokens,
        window=window,
        block_ids=list(range(1 + index * blocks, 1 + (index + 1) * blocks)),
    )
    if kind == BLOCK_WINDOW:
        knobs = ElasticConfig(policy="elastic-block")
        plan.measure = BlockProbe(
            probes=tracked[: knobs.probes],
            watched=~np.isin(everyone, plan.segments[0].positions),
            attention_stride=knobs.attention_stride,
        )
    else:
        tested = tracked if kind == "window" else NO_POSITIONS
        plan.measure = DriftTest(tested, None, ~masked, track_num=1, statistic="released")
    return plan


def rate(rows: int, product: Any, device: Any, args: argparse.Namespace) -> float:
    """Operations a second of the faster of two products of so many rows, in this process.

    Torch's own, and the engine's: vLLM may have a faster one, and a floor that takes the slower
    one would lie above what is measured.

    Args:
        product: the layer of the engine that both multiply with, width to twice the MLP's.
    """
    import torch

    dtype = getattr(torch, args.dtype)
    x = torch.randn(rows, args.width, dtype=dtype, device=device)
    weight = torch.randn(2 * args.mlp, args.width, dtype=dtype, device=device)
    products: tuple[Callable[[], Any], ...] = (
        lambda: torch.nn.functional.linear(x, weight),
        lambda: product(x),
    )
    medians = []
    with torch.inference_mode():
        for multiply in products:
            times = []
            for _ in range(12):
                started = _clock()
                multiply()
                times.append(_clock() - started)
            medians.append(statistics.median(times[2:]))
    return 4 * rows * args.width * args.mlp / min(medians)


def _clock() -> float:
    """Seconds, once an accelerator has done what it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _policy_of(kind: str) -> str:
    """The policy whose requests make such passes: its scheduling is counted with the pass."""
    return {"full": "none", BLOCK_WINDOW: "elastic-block"}.get(kind, "elastic")


PARTS = ("products", "attention", "cache writes", "statistics", "head", "batch", "scheduler")


def _parts() -> dict[str, list[tuple[Any, str]]]:
    from vllm_elastic.models import transformer
    from vllm_elastic.models.hidden_states import HiddenStateCache
    from vllm_elastic.runner.batch import BatchBuilder
    from vllm_elastic.runner.head import Head
    from vllm_elastic.runner.row_order import RowOrder
    from vllm_elastic.runner.statistics.recorder import PassRecorder
    from vllm_elastic.runner.statistics.saved_rows import SavedRows
    from vllm_elastic.runner.statistics.statistics import Statistics

    return {
        "products": [(transformer, "_project"), (transformer, "_finish")],
        "attention": [(transformer, "_attend")],
        "cache writes": [
            (transformer, "_write"),
            (HiddenStateCache, "write"),
            (HiddenStateCache, "read"),
        ],
        "statistics": [
            (SavedRows, "__init__"),
            (Statistics, "before"),
            (PassRecorder, "save_queries"),
            (Statistics, "after"),
            (Statistics, "results"),
        ],
        "head": [(Head, "predict")],
        "batch": [(RowOrder, "of"), (BatchBuilder, "lay_out"), (BatchBuilder, "finish")],
    }


@contextlib.contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of ``PARTS`` while the context is open; each part is waited for."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = _clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += _clock() - started

        return wrapper

    saved = []
    for name, places in _parts().items():
        for owner, attribute in places:
            original = vars(owner)[attribute]
            saved.append((owner, attribute, original))
            if isinstance(original, classmethod):
                setattr(owner, attribute, classmethod(timed(name, original.__func__)))
            else:
                setattr(owner, attribute, timed(name, original))
    try:
        yield seconds
    finally:
        for owner, attribute, original in saved:
            setattr(owner, attribute, original)
