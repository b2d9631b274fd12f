# SPDX-License-Identifier: Apache-2.0
"""Held-out pictures through the engine, under every policy: right answers, passes, work.

Work is in row-layers an answer token; a pass is over the picture if it computes more than a tenth
of the picture's positions.

    python measure.py --count 200
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lessons import CANVAS
from questions import QUESTIONS, Problem, problems

from vllm_elastic.bench.engine import BenchEngine

sys.path.append(str(Path(__file__).resolve().parents[1] / "studies"))
from images import counted

SETTINGS: dict[str, dict[str, Any]] = {
    "one token a step": {"policy": "none", "commit": "threshold", "threshold": 1.0},
    "threshold 0.9": {"policy": "none", "commit": "threshold", "threshold": 0.9},
    "none": {"policy": "none"},
    "dual-cache": {"policy": "dual-cache"},
    "interval": {"policy": "interval"},
    "elastic": {"policy": "elastic"},
    "published": {"preset": "published"},
    "elastic-block": {"preset": "block"},
}
"""The first two are the bar of the training; those below have the commit rule of the default."""
SEED = 7


def request_of(problem: Problem, tokenizer: Any) -> dict[str, Any]:
    """What `BenchEngine.run` takes."""
    content = [{"type": "image"}, {"type": "text", "text": problem.question}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    images = {"image": [problem.image]}
    return {"prompt": prompt, "multi_modal_data": images, "max_tokens": CANVAS}


def measure(engine: BenchEngine, asked: Sequence[Problem], knobs: dict[str, Any]) -> dict[str, Any]:
    """One setting's figures: right answers by kind (None: not asked), and means of an answer."""
    tokenizer = engine.llm.get_tokenizer()
    own = {f"elastic_{name}": value for name, value in knobs.items()}
    with counted(engine) as counts:
        results = engine.run([request_of(problem, tokenizer) | own for problem in asked])
    right, tokens = Counter[str](), 0
    number = Counter(problem.kind for problem in asked)
    for problem, result in zip(asked, results, strict=True):
        right[problem.kind] += problem.check(result["text"])
        tokens += len(result["token_ids"])
    return {
        "right": sum(right.values()) / len(asked),
        **{kind: right[kind] / number[kind] if number[kind] else None for kind in QUESTIONS},
        "tokens": tokens / len(asked),
        "passes": sum(result["passes"] for result in results) / len(asked),
        "over_the_picture": counts["image_passes"] / len(asked),
        "row_layers": sum(result["row_layers"] for result in results) / tokens,
        "of_the_picture": counts["of_image"] / tokens,
    }


def main() -> None:
    """Print a row for each setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    asked = list(problems(args.seed, args.count))
    engine = BenchEngine(
        args.model, dtype=args.dtype, batch_size=16, kv_cache_memory_bytes=300 << 20
    )
    rows = {}
    columns = ("right", *QUESTIONS)
    work = ("passes", "over_the_picture", "row_layers", "of_the_picture")
    print(f"| setting | {' | '.join((*columns, *work)).replace('_', ' ')} |")
    print("|---" * (1 + len(columns) + len(work)) + "|")
    for name in args.settings:
        rows[name] = row = measure(engine, asked, SETTINGS[name])
        figures = ["" if row[column] is None else f"{row[column]:.1%}" for column in columns]
        figures += [f"{row[column]:.1f}" for column in work[:2]]
        figures += [f"{row[column]:.0f}" for column in work[2:]]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
