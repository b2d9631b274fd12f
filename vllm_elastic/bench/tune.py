# SPDX-License-Identifier: Apache-2.0
"""``bench tune``: the cheapest knobs that keep the answers, on a user's own prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import add_engine, add_model, add_prompts
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.problems import Score, percent, score
from vllm_elastic.bench.run import read_jsonl

GAMMAS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
DRIFTS = (1.0, 0.3, 0.2, 0.1, 0.06, 0.04, 0.03, 0.02, 0.01, 0.005)


@dataclass(frozen=True)
class Ladder:
    """A policy's settings from the cheapest to the dearest: one knob's values beside fixed ones."""

    fixed: dict[str, Any]
    knob: str
    values: tuple[float, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for value in self.values:
            yield {**self.fixed, self.knob: value}


LADDERS: dict[str, tuple[Ladder, ...]] = {
    "elastic-block": (Ladder({}, "block_drift", DRIFTS),),
    "elastic": (
        Ladder({"statistic": "paper", "reach": 4}, "gamma", GAMMAS),
        Ladder({"statistic": "paper", "reach": 0}, "gamma", GAMMAS),
        Ladder({"statistic": "released", "reach": 0}, "gamma", GAMMAS),
    ),
    "interval": (Ladder({}, "interval", (64, 32, 16, 8, 6, 4, 3, 2)),),
}


def add_parser(commands: Any) -> None:
    """Add ``tune`` to the command line."""
    parser = commands.add_parser(
        "tune",
        help="find the cheapest knobs whose answers agree with those without a cache",
        description="Runs the prompts without a cache and then with every policy asked for, from "
        "its cheapest setting to its dearest, until the answers are as good as they have to be "
        "or a cheaper setting is known whose answers are; "
        "writes the setting with the fewest row-layers as an --elastic-config. With an 'answer' "
        "in every line of the file, good means accurate; else it means the same tokens.",
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--count", type=int, default=None, metavar="N", help="first N prompts")
    parser.add_argument("--policies", nargs="+", default=list(LADDERS), choices=list(LADDERS))
    parser.add_argument(
        "--accuracy-loss",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="allowed below no cache, in percent points (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.95,
        metavar="SHARE",
        help="of prompts whose answer is the same, where there are no references "
        "(default: %(default)s)",
    )
    add_engine(parser, batch_size=16)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="the config found")
    parser.set_defaults(function=main)


@dataclass(frozen=True)
class Bar:
    """When a setting is good enough.

    Attributes:
        baseline: without a cache.
        accuracy_loss: allowed below the baseline, in percent points.
        agreement: least share of prompts whose answer is the baseline's.
    """

    baseline: Score
    accuracy_loss: float
    agreement: float

    def passed(self, scored: Score) -> bool:
        """By accuracy where the prompts have answers, by agreement where they have none."""
        if self.baseline.accuracy is not None and scored.accuracy is not None:
            lost = 100 * (self.baseline.accuracy - scored.accuracy)
            return lost <= self.accuracy_loss + 1e-9
        assert scored.agreement is not None, "scored without a baseline"
        return scored.agreement >= self.agreement


def main(args: argparse.Namespace) -> None:
    """Print every setting tried, and write the best."""
    prompts = list(read_jsonl(args.prompts))[: args.count]
    engine = BenchEngine(
        args.model,
        dtype=args.dtype,
        batch_size=args.batch_size,
        elastic_config=args.elastic_config,
    )
    none = run(engine, prompts, {"policy": "none"})
    bar = Bar(score(prompts, none, none), args.accuracy_loss, args.agreement)
    print("| setting | accuracy | as none | work | good enough |\n|---|---|---|---|---|")
    print(_line("none", bar.baseline, True), flush=True)
    work, best = 1.0, {"policy": "none"}
    for policy in args.policies:
        for ladder in LADDERS[policy]:
            for knobs in ({"policy": policy, **setting} for setting in ladder):
                scored = score(prompts, run(engine, prompts, knobs), none)
                assert scored.work is not None, "scored with a baseline"
                passed = bar.passed(scored)
                print(_line(", ".join(map(str, knobs.values())), scored, passed), flush=True)
                if passed and scored.work < work:
                    work, best = scored.work, knobs
                if passed or scored.work >= work:  # the rungs above are dearer still
                    break
    config = {**args.elastic_config, **best}
    print(f"\n{work:.3f} of the work without a cache: --elastic-config '{json.dumps(config)}'")
    if args.out is not None:
        args.out.write_text(json.dumps(config) + "\n")


def run(
    engine: BenchEngine, prompts: list[dict[str, Any]], knobs: dict[str, Any]
) -> list[dict[str, Any]]:
    """All prompts with the same knobs."""
    own = {f"elastic_{name}": value for name, value in knobs.items()}
    return engine.run([{**prompt, **own} for prompt in prompts])


def _line(name: str, scored: Score, passed: bool) -> str:
    return (
        f"| {name} | {percent(scored.accuracy)} | {percent(scored.agreement)} | "
        f"{scored.work:.3f} | {'yes' if passed else 'no'} |"
    )
