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
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import add_engine, add_json, add_model, named_knobs, positive
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.problems import Score, percent, score
from vllm_elastic.bench.served_model import served_model
from vllm_elastic.decoding.policies import POLICIES

Runner = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
"""Problems in, one result each out, as ``BenchEngine.run`` has them."""

ORACLES = ("oracle-none", "oracle-elastic")


def add_parser(commands: Any) -> None:
    """Add ``compare`` to the command line."""
    parser = commands.add_parser(
        "compare",
        help="policies x canvas lengths x prompt lengths x batch sizes, with the oracle's speed",
        description="Runs held-out problems of the tiny LLaDA (or of a model with a heldout.py "
        "beside it) under every policy with the same window and commit rule. Repeats are "
        "interleaved; tokens per second are medians, counted up to the first end token. Run it "
        "on a machine that does nothing else.",
    )
    add_model(parser)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES))
    parser.add_argument("--problems", type=positive, default=20, metavar="N")
    parser.add_argument("--gen-length", nargs="+", type=positive, default=[256], metavar="N")
    parser.add_argument(
        "--shots",
        nargs="+",
        type=int,
        default=[0, 900],
        metavar="N",
        help="fill prompts with solved examples up to about N tokens; 0: none",
    )
    parser.add_argument("--batch-size", nargs="+", type=positive, default=[1, 16], metavar="N")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N")
    parser.add_argument("--oracle-problems", type=int, default=4, metavar="N", help="0: no oracle")
    add_engine(parser)
    parser.add_argument(
        "--knobs",
        type=named_knobs,
        default={},
        metavar="JSON",
        help='knobs of single policies: {"elastic": {"gamma": 0.8}}; under another name a row of '
        'its own: {"published": {"preset": "published"}}',
    )
    add_json(parser)
    parser.set_defaults(function=main)


def main(args: argparse.Namespace) -> None:
    """Print one table row for each policy and setting."""
    sets = [
        (gen_length, list(load_problems(args.model, args.problems, gen_length, shots)))
        for gen_length, shots in itertools.product(args.gen_length, args.shots)
    ]
    asked = [problem for _, problems in sets for problem in problems]
    engine = served_model(args, asked, batch_size=max(args.batch_size))
    rows = []
    print("| policy | canvas | prompt | batch | accuracy | as none | passes | work | tokens/s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    oracle = Oracle(engine, args) if args.oracle_problems else None
    for gen_length, problems in sets:
        for batch_size in args.batch_size:
            engine.scheduler.max_num_active_reqs = batch_size
            runners = settings(engine, args)
            if oracle is not None and batch_size == min(args.batch_size):
                runners |= oracle.settings(args.oracle_problems)
            for row in compare(runners, problems, args.repeats):
                # The oracles know no batches.
                size = 1 if row["policy"] in ORACLES else batch_size
                rows.append({"gen_length": gen_length, "batch_size": size, **row})
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


def settings(engine: BenchEngine, args: argparse.Namespace) -> dict[str, Runner]:
    """What is compared, by name: every policy, and what ``--knobs`` adds under other names."""
    chosen = {name: {"policy": name, **args.knobs.get(name, {})} for name in args.policies}
    chosen |= {name: knobs for name, knobs in args.knobs.items() if name not in POLICIES}

    def runner(knobs: dict[str, Any]) -> Runner:
        own = {f"elastic_{name}": value for name, value in knobs.items()}
        return lambda problems: engine.run([{**problem, **own} for problem in problems])

    return {name: runner(knobs) for name, knobs in chosen.items()}


class Oracle:
    """The plain PyTorch oracle in this process, with the engine's knobs."""

    def __init__(self, engine: BenchEngine, args: argparse.Namespace) -> None:
        from vllm_elastic.reference import DecodingOptions, LLaDA

        self.model = LLaDA.from_pretrained(args.model)
        self._tokenizer = engine.llm.get_tokenizer()
        config = asdict(engine.scheduler.elastic_config) | args.knobs.get("elastic", {})
        # What is null in the engine is the oracle's default, too.
        names = [f.name for f in fields(DecodingOptions) if config.get(f.name) is not None]
        self._shared = {name: config[name] for name in names}
        self._elastic = {name: config[name] for name in ("gamma", "statistic", "track_num")}
        self._elastic["reach"] = config["reach"] or 0

    def settings(self, count: int) -> dict[str, Runner]:
        """The two ``ORACLES``, each on the first ``count`` problems."""
        from vllm_elastic.reference import DecodingOptions, ElasticOptions, decode, elastic_cache

        none = DecodingOptions(**self._shared)
        elastic = ElasticOptions(**self._shared, **self._elastic)
        decoders = (partial(decode, options=none), partial(elastic_cache, options=elastic))
        return {
            name: partial(self._run, decoder, count)
            for name, decoder in zip(ORACLES, decoders, strict=True)
        }

    def _run(
        self, decoder: Callable[..., Any], count: int, problems: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        results = []
        for problem in problems[:count]:
            prompt = self._tokenizer.encode(problem["prompt"], add_special_tokens=False)
            answer = decoder(self.model, prompt, problem["max_tokens"])
            results.append(
                {
                    "text": self._tokenizer.decode(answer.token_ids),
                    "prompt_tokens": len(prompt),
                    "token_ids": answer.token_ids,
                    "denoising_steps": answer.denoising_steps,
                    "passes": answer.passes,
                    "row_layers": answer.row_layers,
                }
            )
        return results


def compare(
    runners: dict[str, Runner], problems: list[dict[str, Any]], repeats: int
) -> Iterator[dict[str, Any]]:
    """One row for each setting; every repeat runs all of them in turn.

    A setting that answers the first few of the problems only is scored on these.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(repeats):
        for name, run in runners.items():
            started = time.perf_counter()
            results[name] = run(problems)
            seconds[name].append(time.perf_counter() - started)
    for name, answers in results.items():
        count = len(answers)
        baseline = results["none"][:count] if "none" in results else None
        scored = score(problems[:count], answers, baseline)
        prompt_tokens = [answer["prompt_tokens"] for answer in answers]
        yield make_row(name, prompt_tokens, scored, statistics.median(seconds[name]))


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
