"""Writes the held-out problems as JSONL, with prompts short and of about 850 tokens.

    python heldout.py FOLDER

makes `heldout_short.jsonl` and `heldout_long.jsonl` of 200 problems each, the same on every
machine; with `--terse` also `heldout_terse.jsonl`, which the adapter of that name answers. A line
has `id`, `task`, `prompt` (templated text), `messages`, `answer`, `max_tokens`. `--sharegpt` writes
the same problems as `.json` files beside them, in the form that `vllm bench serve` reads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tasks import TASKS, Problem, problems, terse_problems
from tokenizer import build

HELD_OUT_SEED = 7
CANVAS = 256
LONG = 900


def suite(seed: int, count: int, prompt_tokens: int | None) -> list[Problem]:
    """`count` held-out problems, the tasks in turn; `prompt_tokens` None means short prompts."""
    share = -(-count // len(TASKS))
    columns = [problems(task, seed, share, prompt_tokens) for task in TASKS]
    return [problem for row in zip(*columns, strict=True) for problem in row][:count]


def records(seed: int, count: int, prompt_tokens: int | None) -> Iterator[dict[str, Any]]:
    """The suite as requests: id, task, prompt (templated), messages, answer, max_tokens."""
    return requests(suite(seed, count, prompt_tokens))


def requests(chosen: Iterable[Problem]) -> Iterator[dict[str, Any]]:
    """Problems as requests, with the keys that `records` names."""
    tokenizer = build()
    for problem in chosen:
        messages = problem.messages()
        yield {
            "id": problem.id,
            "task": problem.task,
            "prompt": tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            ),
            "messages": messages,
            "answer": problem.answer,
            "max_tokens": CANVAS,
        }


def conversation(record: dict[str, Any]) -> dict[str, Any]:
    """A request as ShareGPT has it: the templated prompt, and the answer for its length."""
    turns = [("human", record["prompt"]), ("gpt", record["answer"])]
    return {"conversations": [{"from": name, "value": text} for name, text in turns]}


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--terse", action="store_true", help="write the adapter's problems, too")
    parser.add_argument("--sharegpt", action="store_true", help="write ShareGPT's form, too")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {
        "short": records(args.seed, args.count, None),
        "long": records(args.seed, args.count, LONG),
    }
    if args.terse:
        files["terse"] = requests(terse_problems(args.seed, args.count))
    for name, of_file in files.items():
        path = args.folder / f"heldout_{name}.jsonl"
        written = list(of_file)
        path.write_text("".join(json.dumps(record) + "\n" for record in written))
        if args.sharegpt:
            path.with_suffix(".json").write_text(json.dumps(list(map(conversation, written))))


if __name__ == "__main__":
    main()
