# SPDX-License-Identifier: Apache-2.0
"""How many passes could be one CUDA graph each (``vllm_elastic/runner/graphed_pass.py``)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from vllm_elastic.bench.arguments import add_engine, add_model, add_prompts, positive
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.bench.served_model import served_model
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.engine.optimisations import MOST_ROWS_OF_A_WHOLE_PASS
from vllm_elastic.runner.graphed_pass import MOST_REQUESTS


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Serves prompts on this machine, and counts the passes whose rows all join at "
        "layer 0 and test no drift: on a GPU such a pass can be one graph."
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 4, 16], metavar="N")
    parser.add_argument(
        "--count", type=positive, default=None, help="prompts (default: 2 a seat, at least 24)"
    )
    add_engine(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row for each batch size."""
    prompts = list(read_jsonl(args.prompts))
    engine = served_model(args, prompts, max(args.batch_size))
    print("| seats | requests a pass | passes | of them one graph each |\n|---|---|---|---|")
    for seats in args.batch_size:
        engine.scheduler.max_num_active_reqs = seats
        passes = passes_of(engine, prompts[: args.count or max(24, 2 * seats)])
        requests = sum(map(len, passes)) / len(passes)
        share = sum(map(is_one_graph, passes)) / len(passes)
        print(f"| {seats} | {requests:.1f} | {len(passes)} | {share:.0%} |", flush=True)


def passes_of(engine: BenchEngine, asked: Sequence[dict[str, Any]]) -> list[list[PassPlan]]:
    """The plans of every pass that serves these requests."""
    passes: list[list[PassPlan]] = []
    run = engine.runner.run

    def noted(plans: list[PassPlan]) -> Any:
        passes.append(plans)
        return run(plans)

    with patch.object(engine.runner, "run", noted):
        engine.run(asked)
    return passes


def is_one_graph(
    plans: Sequence[PassPlan],
    most_rows: int = MOST_ROWS_OF_A_WHOLE_PASS,
    most_requests: int = MOST_REQUESTS,
) -> bool:
    """Whether a pass has one shape for its number of rows."""
    return (
        len(plans) <= most_requests
        and sum(plan.num_rows for plan in plans) <= most_rows
        and all(
            len(plan.segments) == 1 and not plan.start_layer and not plan.tested.size
            for plan in plans
        )
    )


if __name__ == "__main__":
    main(make_parser().parse_args())
