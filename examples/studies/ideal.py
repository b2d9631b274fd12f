# SPDX-License-Identifier: Apache-2.0
"""Work and accuracy of a refresh policy that knows every position's true drift.

The policy, and what is and is not ideal about it, is in ``ideal_policy.py``. At each step it
recomputes the window, what was just committed, and of the rest only what is needed to keep the
error of the window's attention, as a pass over everything would show it, below a tolerance.
Decoding runs on that policy's own cache, so accuracy and agreement are measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ideal_policy import IdealOptions, ShadowPasses, Work, ideal, without_cache
from transformers import AutoTokenizer

from vllm_elastic.bench.arguments import add_json, add_model, add_prompts
from vllm_elastic.bench.problems import percent, score
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.reference import DecodingResult, LLaDA

PARTS = ("first", "window", "committed", "neighbours", "refreshed", "floor")
COLUMNS = ("accuracy", "as none", "steps", "row-layers a token", "work", *PARTS)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Decodes prompts with the plain PyTorch oracle. Before each step an uncounted "
        "pass over the whole canvas tells what has drifted and what is attended to; only what is "
        "needed to keep the error below a tolerance is recomputed. One row for each combination "
        "of --mandatory, --granularity, --reach and --tolerances; 'answer' in every line of the "
        "file adds accuracy.",
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--count", type=int, default=None, metavar="N", help="first N prompts")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--tokens-per-step", type=int, default=None, metavar="N")
    parser.add_argument(
        "--tolerances",
        nargs="+",
        type=float,
        default=[1.0, 0.1, 0.03, 0.01],
        metavar="SHARE",
        help="drift times attention that may be left at a step (default: %(default)s)",
    )
    parser.add_argument(
        "--granularity",
        nargs="+",
        type=int,
        default=[1],
        metavar="POSITIONS",
        help="refreshed together: 1, or the size of a block (default: %(default)s)",
    )
    parser.add_argument(
        "--reach",
        nargs="+",
        type=int,
        default=[0],
        metavar="POSITIONS",
        help="so far on either side of a commit rows are computed at the next step in any case "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--mandatory",
        nargs="+",
        choices=["window", "committed"],
        default=["window"],
        help="rows computed at every step: the window and what was just committed, or the latter "
        "alone, the window's rows being chosen too (default: %(default)s)",
    )
    parser.add_argument(
        "--prediction-drift",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="change of its output from which a window row that is not mandatory is computed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--slack",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of its largest drift that a row may have at the layer where it joins "
        "(default: %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N")
    add_json(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row for each setting once all prompts are decoded; progress to standard error."""
    model = LLaDA.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = list(read_jsonl(args.prompts))[: args.count]
    settings = settings_of(args)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in ("none", *settings)}
    for number, prompt in enumerate(prompts, start=1):
        token_ids = prompt.get("prompt_token_ids") or tokenizer.encode(
            prompt["prompt"], add_special_tokens=False
        )
        max_tokens = prompt.get("max_tokens") or args.max_tokens
        for name, result in decodings(model, token_ids, max_tokens, settings):
            results[name].append({**result, "text": tokenizer.decode(result["token_ids"])})
        print(f"{number} of {len(prompts)} prompts", file=sys.stderr, flush=True)
    rows = [summary(name, prompts, results[name], results["none"]) for name in results]
    print("| setting | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for row in rows:
        print(_line(row))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def settings_of(args: argparse.Namespace) -> dict[str, IdealOptions]:
    """Every combination asked for, by name."""
    combinations = itertools.product(args.mandatory, args.granularity, args.reach, args.tolerances)
    return {
        f"{mandatory}, granularity {granularity}, reach {reach}, tolerance {tol:g}": IdealOptions(
            window=args.window,
            threshold=args.threshold,
            tokens_per_step=args.tokens_per_step,
            tolerance=tol,
            slack=args.slack,
            granularity=granularity,
            reach=reach,
            mandatory=mandatory,
            prediction_drift=args.prediction_drift,
        )
        for mandatory, granularity, reach, tol in combinations
    }


def decodings(
    model: LLaDA, prompt: Sequence[int], max_tokens: int, settings: Mapping[str, IdealOptions]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(setting, result as ``score`` reads it, with its row-layers by part) of one prompt.

    "none" first: its passes are the shadow passes that the settings share.
    """
    shadow = ShadowPasses(model)
    none = without_cache(model, prompt, max_tokens, next(iter(settings.values())), shadow)
    yield "none", _result(none, Work())
    for name, options in settings.items():
        result = ideal(model, prompt, max_tokens, options, shadow)
        yield name, _result(result, result.work)


def _result(result: DecodingResult, work: Work) -> dict[str, Any]:
    return {
        "token_ids": result.token_ids,
        "denoising_steps": result.denoising_steps,
        "passes": result.passes,
        "row_layers": result.row_layers,
        **asdict(work),
    }


def summary(
    name: str,
    prompts: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """``score`` of a setting, and its parts: row-layers a token, as a share of ``none``'s.

    All parts but the floor add up to ``work``; ``none`` has no parts.
    """
    scored = score(prompts, results, baseline)
    none_per_token = score(prompts, baseline).work_per_token
    parts = {
        part: sum(result[part] for result in results) / max(scored.tokens, 1) / none_per_token
        for part in PARTS
    }
    return {"setting": name, **asdict(scored), **parts}


def _line(row: dict[str, Any]) -> str:
    parts = ["" if row["setting"] == "none" else f"{row[part]:.3f}" for part in PARTS]
    cells = [
        row["setting"],
        percent(row["accuracy"]),
        percent(row["agreement"]),
        f"{row['steps']:.1f}",
        f"{row['work_per_token']:.1f}",
        f"{row['work']:.3f}",
        *parts,
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(make_parser().parse_args())
