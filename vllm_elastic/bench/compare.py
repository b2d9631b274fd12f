# SPDX-License-Identifier: Apache-2.0
"""``bench compare``: policies against each other and against the oracle, in one interleaved run."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import add_engine, add_json, add_model
from vllm_elastic.bench.engine import DEFAULT_KV_CACHE_BYTES, BenchEngine
from vllm_elastic.bench.problems import Score, percent, score
from vllm_elastic.decoding.policies import POLICIES

ORACLES = ("oracle-none", "oracle-elastic")


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="policies x canvas lengths x prompt lengths x batch sizes, with the oracle's speed",
        description="Runs held-out problems of the tiny LLaDA (or of a model with a heldout.py "
        "beside it) under every policy with the same window and threshold. Repeats are "
        "interleaved; tokens per second are medians, counted up to the first end token. Run it "
        "on a machine that does nothing else.",
    )
    add_model(parser)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--problems", type=int, default=20, metavar="N")
    parser.add_argument("--gen-length", nargs="+", type=int, default=[256], metavar="N")
    parser.add_argument(
        "--shots",
        nargs="+",
        type=int,
        default=[0, 900],
        metavar="N",
        help="fill prompts with solved examples up to about N tokens; 0: none",
    )
    parser.add_argument("--batch-size", nargs="+", type=int, default=[1, 16], metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--oracle-problems", type=int, default=4, metavar="N", help="0: no oracle")
    add_engine(parser)
    parser.add_argument(
        "--knobs",
        type=json.loads,
        default={},
        metavar="JSON",
        help='knobs of single policies: {"elastic": {"gamma": 0.8}}',
    )
    add_json(parser)
    parser.set_defaults(function=main)


def main(args: argparse.Namespace) -> None:
    """Print one table row for each policy and setting."""
    engine = BenchEngine(
        args.model,
        dtype=args.dtype,
        batch_size=max(args.batch_size),
        elastic_config=args.elastic_config,
        kv_cache_memory_bytes=DEFAULT_KV_CACHE_BYTES,
    )
    rows = []
    print("| policy | canvas | prompt | batch | accuracy | as none | passes | work | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for gen_length, shots in itertools.product(args.gen_length, args.shots):
        problems = list(load_problems(args.model, args.problems, gen_length, shots))
        for batch_size in args.batch_size:
            for row in compare(engine, problems, batch_size, args):
                rows.append({"gen_length": gen_length, "batch_size": batch_size, **row})
                print(_line(rows[-1]), flush=True)
        for row in oracle_rows(engine, problems[: args.oracle_problems], args):
            rows.append({"gen_length": gen_length, "batch_size": 1, **row})
            print(_line(rows[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def load_problems(model: Path, count: int, gen_length: int, shots: int) -> Iterator[dict[str, Any]]:
    """Held-out problems from the generator that stands beside a checkpoint.

    Raises:
        SystemExit: there is none.
    """
    folder = model.resolve().parent
    if not (folder / "heldout.py").exists():
        raise SystemExit(f"--model: no problem generator {folder / 'heldout.py'}")
    sys.path.insert(0, str(folder))
    try:
        heldout = importlib.import_module("heldout")
    finally:
        sys.path.remove(str(folder))
    for problem in heldout.records(heldout.HELD_OUT_SEED, count, shots or None):
        yield {**problem, "max_tokens": gen_length}


def compare(
    engine: BenchEngine, problems: list[dict[str, Any]], batch_size: int, args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """One row for each policy; every repeat runs all of them in turn."""
    seconds: dict[str, list[float]] = {policy: [] for policy in args.policies}
    results: dict[str, list[dict[str, Any]]] = {}
    engine.scheduler.max_num_active_reqs = batch_size
    for _ in range(args.repeats):
        for policy in args.policies:
            knobs = {f"elastic_{k}": v for k, v in args.knobs.get(policy, {}).items()}
            requests = [{**p, "elastic_policy": policy, **knobs} for p in problems]
            started = time.perf_counter()
            results[policy] = engine.run(requests)
            seconds[policy].append(time.perf_counter() - started)
    for policy in args.policies:
        scored = score(problems, results[policy], results.get("none"))
        prompt_tokens = [answer["prompt_tokens"] for answer in results[policy]]
        yield make_row(policy, prompt_tokens, scored, statistics.median(seconds[policy]))


def oracle_rows(
    engine: BenchEngine, problems: list[dict[str, Any]], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The plain PyTorch oracle on a few of the problems, with and without a cache."""
    if not problems:
        return
    from vllm_elastic.reference import (
        DecodingOptions,
        ElasticOptions,
        LLaDA,
        decode,
        elastic_cache,
    )

    model = LLaDA.from_pretrained(args.model)
    tokenizer = engine.llm.get_tokenizer()
    base = engine.scheduler.elastic_config
    shared = {"window": base.window, "threshold": base.threshold}
    elastic = {"gamma": base.gamma, "statistic": base.statistic, "track_num": base.track_num}
    elastic |= {k: v for k, v in args.knobs.get("elastic", {}).items() if k in elastic}
    prompts = [tokenizer.encode(p["prompt"], add_special_tokens=False) for p in problems]
    for name in ORACLES:
        started, answers = time.perf_counter(), []
        for problem, prompt in zip(problems, prompts, strict=True):
            if name == "oracle-none":
                options = DecodingOptions(**shared)
                answers.append(decode(model, prompt, problem["max_tokens"], options))
            else:
                with_cache = ElasticOptions(**shared, **elastic)
                answers.append(elastic_cache(model, prompt, problem["max_tokens"], with_cache))
        seconds = time.perf_counter() - started
        results = [
            {
                "text": tokenizer.decode(answer.token_ids),
                "token_ids": answer.token_ids,
                "denoising_steps": answer.denoising_steps,
                "passes": answer.passes,
                "row_layers": answer.row_layers,
            }
            for answer in answers
        ]
        # No agreement: the oracle answers other problems than the engine, the first few.
        yield make_row(name, [len(prompt) for prompt in prompts], score(problems, results), seconds)


def make_row(name: str, prompt_tokens: list[int], scored: Score, seconds: float) -> dict[str, Any]:
    """A row of the table and of ``--json``.

    Args:
        prompt_tokens: prompt length of each problem.
        seconds: for all problems together.
    """
    return {
        "policy": name,
        "prompt_tokens": round(statistics.mean(prompt_tokens)),
        "problems": len(prompt_tokens),
        "accuracy": scored.accuracy,
        "agreement": scored.agreement,
        "passes": scored.passes,
        "row_layers_per_token": scored.work_per_token,
        "tokens_per_second": scored.tokens / seconds,
    }


def _line(row: dict[str, Any]) -> str:
    same = percent(row["agreement"], decimals=0)
    return (
        f"| {row['policy']} | {row['gen_length']} | {row['prompt_tokens']} | {row['batch_size']} | "
        f"{percent(row['accuracy'])} | {same} | {row['passes']:.1f} | "
        f"{row['row_layers_per_token']:.0f} | {row['tokens_per_second']:.1f} |"
    )
