"""Accuracy and cost of several settings on a task of lm-evaluation-harness, through a server.

    python examples/evaluate/evaluate.py llada-1.5 gsm8k --server http://localhost:8000

Answer tokens, seconds, passes and row-layers are the server's own counts of these requests: end
tokens, masks and padding are in none of them. Nobody else may use the server meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from recipes import RECIPES, Published, Recipe

TASKS = Path(__file__).parent / "tasks"

SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"elastic_preset": "block"},
    "no cache": {"elastic_preset": "exact"},
    "dual-cache": {"elastic_policy": "dual-cache", "elastic_block_length": 32},
    "published": {"elastic_preset": "published"},
}
"""What is compared, by name: fields of a request's ``vllm_xargs``."""

REQUESTS = "vllm:elastic_requests_total"
TOKENS = "vllm:generation_tokens_total"
STEPS = "vllm:elastic_denoising_steps_total"
ROW_LAYERS = "vllm:elastic_row_layers_total"
LATENCY = "vllm:e2e_request_latency_seconds_sum"


@dataclass
class Outcome:
    """What one setting did.

    Attributes:
        accuracy: percent.
        tokens: of all answers.
        seconds: of all requests, from their arrival to their end; wall_seconds: of the run.
    """

    setting: str
    accuracy: float
    requests: int
    tokens: int
    steps: int
    row_layers: int
    seconds: float
    wall_seconds: float


def counted(server: str) -> dict[str, float]:
    """The server's counters now, summed over their labels."""
    with urllib.request.urlopen(f"{server}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        totals = dict.fromkeys((REQUESTS, TOKENS, STEPS, ROW_LAYERS, LATENCY), 0.0)
        for family in families:
            for sample in family.samples:
                if sample.name in totals:
                    totals[sample.name] += sample.value
    return totals


def served_model(server: str) -> str:
    """The name of the first model that it serves."""
    with urllib.request.urlopen(f"{server}/v1/models", timeout=60) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def run(recipe: Recipe, setting: str, args: argparse.Namespace) -> Outcome:
    """One setting on the recipe's task.

    Raises:
        RuntimeError: the harness and the server do not agree on the number of requests.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    path = "chat/completions" if recipe.chat else "completions"
    before, began = counted(args.server), time.monotonic()
    found = simple_evaluate(
        model="local-chat-completions" if recipe.chat else "local-completions",
        model_args={
            "model": served_model(args.server),
            "base_url": f"{args.server}/v1/{path}",
            # Text is sent as it is: the server has the tokenizer, and nothing may be cut off.
            "tokenizer_backend": None,
            "tokenized_requests": False,
            "num_concurrent": args.concurrent,
            "timeout": 3600,
        },
        tasks=[recipe.task],
        task_manager=TaskManager(include_path=str(TASKS)),
        num_fewshot=recipe.shots,
        apply_chat_template=recipe.chat,
        fewshot_as_multiturn=False,
        gen_kwargs={
            "max_gen_toks": recipe.canvas,
            "vllm_xargs": {**recipe.knobs, **SETTINGS[setting]},
        },
        limit=args.limit,
        confirm_run_unsafe_code=True,  # HumanEval and MBPP run what the model wrote
        bootstrap_iters=0,
    )
    wall_seconds = time.monotonic() - began
    after = counted(args.server)
    count = {name: after[name] - before[name] for name in after}
    scored = [
        (values[recipe.metric], found["n-samples"][task]["effective"])
        for task, values in found["results"].items()
        if recipe.metric in values
    ]
    samples = sum(number for _, number in scored)
    if samples != count[REQUESTS]:
        raise RuntimeError(
            f"the harness scored {samples} answers and the server ended "
            f"{count[REQUESTS]:.0f} requests: use a server that nobody else uses"
        )
    return Outcome(
        setting=setting,
        accuracy=100 * sum(score * number for score, number in scored) / samples,
        requests=samples,
        tokens=int(count[TOKENS]),
        steps=int(count[STEPS]),
        row_layers=int(count[ROW_LAYERS]),
        seconds=count[LATENCY],
        wall_seconds=wall_seconds,
    )


def table(outcomes: list[Outcome], published: tuple[Published, ...]) -> str:
    """Markdown: what ran here, and beneath it what others report."""
    columns = ["setting", "accuracy", "answer tokens a request", "tokens/s of a request"]
    columns += ["tokens/s of the run", "tokens a step", "row-layers a token"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for one in outcomes:
        tokens = max(one.tokens, 1)
        lines.append(
            f"| {one.setting} | {one.accuracy:.2f}% | {one.tokens / one.requests:.1f} "
            f"| {one.tokens / one.seconds:.1f} | {one.tokens / one.wall_seconds:.1f} "
            f"| {one.tokens / one.steps:.2f} | {one.row_layers / tokens:.0f} |"
        )
    for row in published:
        speed = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}"
        lines.append(f"| *reported: {row.setting}* | {row.accuracy:.2f}% | | {speed} | | | |")
    return "\n".join(lines)


def main() -> None:
    """Run every setting, print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("task", help="one of the model's: gsm8k, minerva_math, humaneval, mbpp")
    parser.add_argument("--server", default="http://localhost:8000")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--limit", type=int, help="problems; by default all")
    parser.add_argument("--concurrent", type=int, default=1, help="requests at a time")
    parser.add_argument("--out", type=Path, help="the outcomes as JSON")
    args = parser.parse_args()
    recipe = RECIPES[args.model].get(args.task)
    if recipe is None:
        parser.error(f"{args.model} has no task {args.task}: {', '.join(RECIPES[args.model])}")
    os.environ.setdefault("HF_ALLOW_CODE_EVAL", "1")
    if args.out:
        args.out = args.out.resolve()
    os.chdir(TASKS)  # a local task names its file
    outcomes = [run(recipe, setting, args) for setting in args.settings]
    if args.out:
        args.out.write_text(json.dumps([asdict(one) for one in outcomes], indent=1) + "\n")
    print(table(outcomes, recipe.published))


if __name__ == "__main__":
    main()
