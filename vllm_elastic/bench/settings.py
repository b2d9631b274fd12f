# SPDX-License-Identifier: Apache-2.0
"""``bench settings``: what knobs do to accuracy, passes and work, on problems with answers."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import add_adapter, add_count, add_engine, add_json, add_model
from vllm_elastic.bench.problems import Score, is_right, read_problems, score
from vllm_elastic.bench.served_model import served_model
from vllm_elastic.config import POLICIES, STATISTICS, knobs_of


def add_parser(commands: Any) -> None:
    """Add ``settings`` to the command line."""
    parser = commands.add_parser(
        "settings",
        help="accuracy, passes and work of settings of your choice",
        description="Reads problems with answers (JSONL: prompt, answer, optional max_tokens) and "
        "runs them without a cache and then under every setting that is named, in one engine.",
    )
    add_model(parser)
    parser.add_argument("--problems", required=True, type=Path, metavar="FILE")
    add_count(parser, "problems")
    parser.add_argument(
        "--configs",
        nargs="+",
        type=knobs_of,
        default=[],
        metavar="JSON",
        help='settings: \'{"policy": "elastic-block", "block_drift": 0.05}\'',
    )
    parser.add_argument(
        "--policies",
        nargs="+",
        default=[],
        choices=POLICIES,
        help="settings that are a policy and nothing else",
    )
    parser.add_argument(
        "--gammas",
        nargs="+",
        type=float,
        default=[],
        metavar="GAMMA",
        help="settings of Elastic-Cache, one for each of --statistics",
    )
    parser.add_argument(
        "--statistics",
        nargs="+",
        default=None,
        choices=STATISTICS,
        help="drift statistics of --gammas (default: both)",
    )
    add_engine(parser, batch_size=16)
    add_adapter(parser)
    add_json(parser)
    parser.set_defaults(function=main)


def named_settings(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """What is run, by the name of its row, with the fields of its requests.

    Raises:
        SystemExit: statistics are named and no gamma is.
    """
    if args.statistics and not args.gammas:
        raise SystemExit("settings: --statistics is of --gammas; name some")
    elastic = [
        (f"elastic, {statistic}, gamma {gamma:g}", {"statistic": statistic, "gamma": gamma})
        for statistic in args.statistics or STATISTICS
        for gamma in args.gammas
    ]
    named: list[tuple[str, dict[str, Any]]] = [
        *((policy, {"policy": policy}) for policy in ("none", *args.policies)),
        *((name, {"policy": "elastic", **knobs}) for name, knobs in elastic),
        *((_name(knobs), knobs) for knobs in args.configs),
    ]
    return [
        (name, {f"elastic_{key}": value for key, value in knobs.items()}) for name, knobs in named
    ]


def _name(knobs: dict[str, Any]) -> str:
    shown = [f"{value}" if key == "policy" else f"{key} {value}" for key, value in knobs.items()]
    return ", ".join(shown)


def main(args: argparse.Namespace) -> None:
    """Print the table as it grows."""
    chosen = named_settings(args)
    problems = read_problems(args.problems, args.count)
    engine = served_model(args, problems, adapter=args.adapter)
    print(f"{len(problems)} problems, {engine.dtype}, batch {args.batch_size}")
    print("| policy | accuracy | same tokens as none | steps | passes | work vs none | seconds |")
    print("|---|---|---|---|---|---|---|", flush=True)
    baseline: list[dict[str, Any]] = []
    rows = []
    for name, knobs in chosen:
        started = time.perf_counter()
        results = engine.run([{**problem, **knobs} for problem in problems])
        seconds = time.perf_counter() - started
        baseline = baseline or results
        scored = score(problems, results, baseline)
        print(_line(name, scored, seconds), flush=True)
        tasks = by_task(problems, results)
        rows.append(
            {"policy": name, **knobs, **asdict(scored), "seconds": seconds, "by_task": tasks}
        )
    if len(tasks) > 1:
        print_tasks(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def by_task(
    problems: list[dict[str, Any]], results: list[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """Problems, accuracy and median denoising steps of each ``task`` that the file names."""
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for problem, result in zip(problems, results, strict=True):
        groups.setdefault(problem.get("task", ""), []).append((problem, result))
    return {
        task: {
            "problems": len(pairs),
            "accuracy": statistics.mean(is_right(*pair) for pair in pairs),
            "median_steps": statistics.median(result["denoising_steps"] for _, result in pairs),
        }
        for task, pairs in groups.items()
    }


def print_tasks(rows: list[dict[str, Any]]) -> None:
    """Accuracy and median steps of each policy, a column a task."""
    tasks = list(rows[0]["by_task"])
    print("\n| policy | " + " | ".join(tasks) + " |")
    print("|---" * (len(tasks) + 1) + "|")
    for row in rows:
        cells = [row["by_task"][task] for task in tasks]
        shown = [f"{cell['accuracy']:.0%} in {cell['median_steps']:.0f} steps" for cell in cells]
        print(f"| {row['policy']} | " + " | ".join(shown) + " |")


def _line(name: str, scored: Score, seconds: float) -> str:
    return (
        f"| {name} | {scored.accuracy:.1%} | {scored.agreement:.1%} | {scored.steps:.1f} | "
        f"{scored.passes:.1f} | {scored.work:.3f} | {seconds:.1f} |"
    )
