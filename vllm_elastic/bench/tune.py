# SPDX-License-Identifier: Apache-2.0
"""``bench tune``: the cheapest knobs that keep the answers, on a user's own prompts."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import add_adapter, add_count, add_engine, add_model, add_prompts
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.problems import Score, percent, score
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.bench.served_model import served_model

GAMMAS = (0.0, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
DRIFTS = (1.0, 0.3, 0.2, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005)
BASELINE = {"policy": "none", "commit": "threshold"}
"""What answers are held against: nothing cached, and the commit rule that everybody has."""
COSTS = ("row-layers", "seconds")


@dataclass(frozen=True)
class Ladder:
    """Settings from the cheapest to the dearest: one knob's values beside fixed ones."""

    fixed: dict[str, Any]
    knob: str
    values: tuple[float, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for value in self.values:
            yield {**self.fixed, self.knob: value}


LADDERS: dict[str, tuple[Ladder, ...]] = {
    "elastic-block": (Ladder({}, "block_drift", DRIFTS),),
    "elastic": (
        Ladder({"statistic": "paper", "track_num": 4, "reach": 4}, "gamma", GAMMAS),
        Ladder({"statistic": "paper", "track_num": 1, "reach": 4}, "gamma", GAMMAS),
        Ladder({"statistic": "paper", "track_num": 1, "reach": 0}, "gamma", GAMMAS),
        Ladder({"statistic": "released", "track_num": 1, "reach": 0}, "gamma", GAMMAS),
    ),
    "interval": (Ladder({}, "interval", (64, 32, 16, 8, 6, 4, 3, 2)),),
    "dual-cache": (Ladder({}, "block_length", (64, 32, 16, 8)),),
}


GROWTH = Ladder({"grow_by": 64}, "grow_ahead", (33, 65, 129))
"""How many masks stand ahead of the text. Every text block that is tried divides 64."""


def decoding(policy: str) -> Iterator[Ladder]:
    """The ladders of how many positions a step predicts, how sure a prediction has to be to be
    committed, and where that can be chosen, how many rows a pass has."""
    sizes = [{}] if policy == "dual-cache" else [{"window": size} for size in (64, 32, 16)]
    for size in sizes:
        yield Ladder({**size, "commit": "frontier"}, "frontier_threshold", (0.3, 0.5, 0.7, 0.9))
        yield Ladder({**size, "commit": "steady"}, "steady_threshold", (0.75, 0.8, 0.85))
    yield Ladder({"commit": "local"}, "relaxed_threshold", (0.7, 0.8, 0.85))
    yield Ladder({"commit": "factor"}, "factor", (1.0, 0.75, 0.5))
    yield Ladder({"commit": "frechet"}, "frechet_margin", (0.25, 0.5))
    yield Ladder({"commit": "credit"}, "credit_weight", (0.7, 0.3))
    if policy == "elastic-block":
        yield Ladder({"commit": "steady"}, "rows_per_pass", (64, 128, 256))


def add_parser(commands: Any) -> None:
    """Add ``tune`` to the command line."""
    parser = commands.add_parser(
        "tune",
        help="find the cheapest knobs whose answers agree with those without a cache",
        description="Runs the prompts without a cache and then with every policy asked for, from "
        "its cheapest setting to its dearest, until the answers are as good as they have to be "
        "or a cheaper setting is known whose answers are; then, with the policy found, other "
        "windows and commit rules, and fewer masks ahead of the text, in the same way. Writes the "
        "cheapest setting as an --elastic-config. With an 'answer' in every line of the file, "
        "good means accurate; else it means the same tokens. Part of the prompts is kept aside, "
        "and tells at the end how the setting does on prompts that it was not chosen by.",
    )
    add_model(parser)
    add_prompts(parser)
    add_count(parser, "prompts")
    parser.add_argument("--policies", nargs="+", default=list(LADDERS), choices=list(LADDERS))
    parser.add_argument(
        "--cost",
        default=COSTS[0],
        choices=COSTS,
        help="what is to be cheap: row-layers, the same on every machine, or the seconds that "
        "the prompts take at this batch size on this one, which should do nothing else (default: "
        "%(default)s)",
    )
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
    parser.add_argument(
        "--check-share",
        type=_share,
        default=0.25,
        metavar="SHARE",
        help="of the prompts, drawn at random, to check the setting found (default: %(default)s)",
    )
    add_engine(parser, batch_size=16)
    add_adapter(parser)
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="the config found")
    parser.set_defaults(function=main)


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1")
    return share


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
        """Whether a score is good enough: by accuracy where the prompts have answers, by agreement
        where they have none."""
        if self.baseline.accuracy is not None and scored.accuracy is not None:
            lost = 100 * (self.baseline.accuracy - scored.accuracy)
            return lost <= self.accuracy_loss + 1e-9
        assert scored.agreement is not None, "scored without a baseline"
        return scored.agreement >= self.agreement

    def __str__(self) -> str:
        if self.baseline.accuracy is not None:
            least = max(0.0, self.baseline.accuracy - self.accuracy_loss / 100)
            return f"an accuracy of at least {percent(least)}"
        return f"the same answer as without a cache for at least {percent(self.agreement)}"


@dataclass(frozen=True)
class Trial:
    """Prompts, and their results without a cache, to hold settings against.

    Attributes:
        cost: one of ``COSTS``.
        seconds: that the baseline took.
    """

    prompts: list[dict[str, Any]]
    none: list[dict[str, Any]]
    bar: Bar
    cost: str
    seconds: float

    def score(self, engine: BenchEngine, knobs: dict[str, Any]) -> tuple[Score, float]:
        """Run the prompts with these knobs; the score, and the cost relative to the baseline's."""
        results, seconds = run(engine, self.prompts, knobs)
        scored = score(self.prompts, results, self.none)
        assert scored.work is not None, "scored with a baseline"
        costs = {
            "row-layers": scored.work,
            "seconds": seconds / self.seconds,
        }
        return scored, costs[self.cost]


def main(args: argparse.Namespace) -> None:
    """Print every setting tried, write the best, and check it on the prompts kept aside."""
    prompts = list(read_jsonl(args.prompts))[: args.count]
    aside = kept_aside(len(prompts), args.check_share)
    engine = served_model(args, prompts, adapter=args.adapter)

    def trial(chosen: list[int]) -> Trial:
        own = [prompts[i] for i in chosen]
        none, seconds = run(engine, own, BASELINE)
        bar = Bar(score(own, none, none), args.accuracy_loss, args.agreement)
        return Trial(own, none, bar, args.cost, seconds)

    if args.cost == "seconds":  # an engine's first passes take longer: oneDNN compiles products
        run(engine, prompts[: args.batch_size], BASELINE)
    tuning = trial([i for i in range(len(prompts)) if i not in aside])
    print(f"{len(tuning.prompts)} prompts to choose by; good enough: {tuning.bar}\n")
    _print_head(tuning)
    cost, best = find(engine, tuning, args.policies)
    config = {**args.elastic_config, **best}
    print(
        f"\n{cost:.3f} of the {args.cost} without a cache: --elastic-config '{json.dumps(config)}'"
    )
    if args.out is not None:
        args.out.write_text(json.dumps(config) + "\n")
    if aside:
        check(engine, trial(sorted(aside)), best)


def kept_aside(count: int, share: float) -> set[int]:
    """Which of ``count`` prompts to check with: always the same, at random as files have an order.

    At least one is left to choose by.
    """
    return set(random.Random(0).sample(range(count), min(round(count * share), count - 1)))


def find(engine: BenchEngine, tuning: Trial, policies: list[str]) -> tuple[float, dict[str, Any]]:
    """The good enough setting of the least cost, relative to the baseline; that, if there is none.

    What a refresh policy saves and what a step commits hardly depend on each other, so the policy
    is found first, with the engine's own window and commit rule, these are found with it, and last
    how much of the canvas may wait. Prints every setting tried.
    """
    found = 1.0, BASELINE
    ladders = [(policy, ladder) for policy in policies for ladder in LADDERS[policy]]
    for policy, ladder in ladders:
        found = climb(engine, tuning, ({"policy": policy, **knobs} for knobs in ladder), found)
    refreshed = found[1]
    for ladder in decoding(refreshed["policy"]):
        found = climb(engine, tuning, ({**refreshed, **knobs} for knobs in ladder), found)
    decided = found[1]
    return climb(engine, tuning, ({**decided, **knobs} for knobs in GROWTH), found)


def climb(
    engine: BenchEngine,
    tuning: Trial,
    settings: Iterable[dict[str, Any]],
    found: tuple[float, dict[str, Any]],
) -> tuple[float, dict[str, Any]]:
    """The first good enough of settings that get dearer, if it is cheaper than what was found."""
    for knobs in settings:
        scored, cost = tuning.score(engine, knobs)
        passed = tuning.bar.passed(scored)
        print(_line(_name(knobs), scored, cost, passed), flush=True)
        if passed and cost < found[0]:
            found = cost, knobs
        if passed or cost >= found[0]:  # the rungs above are dearer still
            break
    return found


def check(engine: BenchEngine, held_out: Trial, best: dict[str, Any]) -> None:
    """Print how the setting found does on the prompts kept aside."""
    scored, cost = held_out.score(engine, best)
    passed = held_out.bar.passed(scored)
    count = len(held_out.prompts)
    print(f"\nOn the {count} prompts it was not chosen by; good enough: {held_out.bar}\n")
    _print_head(held_out)
    print(_line(_name(best), scored, cost, passed), flush=True)
    if not passed:
        print(
            f"\nNot good enough there (one prompt is {100 / count:.1f} points). It may fit the "
            "prompts that chose it better than others: take more prompts, or ask for more with "
            "a smaller --accuracy-loss or a larger --agreement."
        )


def run(
    engine: BenchEngine, prompts: list[dict[str, Any]], knobs: dict[str, Any]
) -> tuple[list[dict[str, Any]], float]:
    """All prompts with the same knobs; their results, and the seconds that they took together."""
    own = {f"elastic_{name}": value for name, value in knobs.items()}
    started = time.perf_counter()
    results = engine.run([{**prompt, **own} for prompt in prompts])
    return results, time.perf_counter() - started


def _name(knobs: dict[str, Any]) -> str:
    policy, *others = knobs.items()
    return ", ".join([policy[1], *(f"{name} {value}" for name, value in others)])


def _print_head(trial: Trial) -> None:
    print(f"| setting | accuracy | as none | passes | {trial.cost} | good enough |")
    print("|---|---|---|---|---|---|")
    print(_line("none", trial.bar.baseline, 1.0, True), flush=True)


def _line(name: str, scored: Score, cost: float, passed: bool) -> str:
    return (
        f"| {name} | {percent(scored.accuracy)} | {percent(scored.agreement)} | "
        f"{scored.passes:.1f} | {cost:.3f} | {'yes' if passed else 'no'} |"
    )
