"""Exact match and denoising steps of a checkpoint, decoded without a cache in plain PyTorch.

The decoding is Elastic-Cache's commit rule alone: every step is a forward over the whole canvas;
of the first `--window` masked positions (holes skipped), those are committed whose largest
probability is at least min(threshold, the best in the window). `--threshold 1` therefore commits
one token a step. After an EOS is committed, masked positions beyond it are dropped.

    python evaluate.py --checkpoint checkpoint --count 200 --prompt-tokens 900 --threshold 0.9
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from heldout import CANVAS, HELD_OUT_SEED, suite
from lora import merge
from model import TinyLLaDA, load
from tasks import TASKS, terse_problems
from torch import Tensor
from transformers import AutoTokenizer


@dataclass
class Canvas:
    """One problem being decoded: its tokens, and which of them are still to be decoded."""

    index: int
    ids: Tensor
    start: int
    open: Tensor
    steps: int = 0

    def commit(self, positions: Tensor, tokens: Tensor, eos_id: int) -> None:
        """Fix tokens at canvas positions; an EOS drops what is masked beyond it."""
        self.steps += 1
        self.ids[positions] = tokens
        self.open[positions] = False
        ends = positions[tokens == eos_id]
        if len(ends):
            self.open[int(ends.min()) + 1 :] = False

    def answer(self, eos_id: int) -> list[int]:
        """Tokens up to and without the first EOS."""
        response: list[int] = self.ids[self.start :].tolist()
        return response[: response.index(eos_id)] if eos_id in response else response


def open_canvas(index: int, prompt: list[int], size: int, mask_id: int) -> Canvas:
    """A canvas of the prompt and `size` masked positions."""
    ids = torch.tensor(prompt + [mask_id] * size)
    return Canvas(index, ids, len(prompt), ids == mask_id)


def forward_window(
    model: TinyLLaDA, canvases: list[Canvas], window: int
) -> Iterator[tuple[Canvas, Tensor, Tensor, Tensor]]:
    """One forward over whole canvases; per canvas its window's positions, candidates, confidence.

    Shorter canvases are padded behind their end, and padding is masked out of the attention, so
    each problem's result is its own.
    """
    longest = max(len(canvas.ids) for canvas in canvases)
    ids = torch.zeros(len(canvases), longest, dtype=torch.long)
    bias = torch.zeros(len(canvases), 1, 1, longest)
    for row, canvas in enumerate(canvases):
        ids[row, : len(canvas.ids)] = canvas.ids
        bias[row, ..., len(canvas.ids) :] = -torch.inf
    padded = bool(bias.isinf().any())
    hidden = model.hidden(ids, bias.to(next(model.parameters()).dtype) if padded else None)
    for row, canvas in enumerate(canvases):
        positions = canvas.open.nonzero()[:window, 0]
        confidence, tokens = model.head(hidden[row, positions]).double().softmax(-1).max(-1)
        yield canvas, positions, tokens, confidence


@torch.inference_mode()
def decode(
    model: TinyLLaDA,
    prompts: list[list[int]],
    size: int,
    window: int,
    threshold: float,
    ends: tuple[int, int],
    batch: int,
) -> list[tuple[list[int], int]]:
    """Answers (up to the first EOS) and denoising steps, in the order of the prompts.

    `size` is the number of masked positions, `ends` the ids of the mask and of EOS, `batch` how
    many problems are decoded at a time (the next joins when one is done). A threshold of 1 or
    more commits only the best of the window (on a tie the first).
    """
    mask_id, eos_id = ends
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    waiting = [open_canvas(index, prompts[index], size, mask_id) for index in order]
    running: list[Canvas] = []
    results: dict[int, tuple[list[int], int]] = {}
    while waiting or running:
        while waiting and len(running) < batch:
            running.append(waiting.pop(0))
        for canvas, positions, tokens, confidence in forward_window(model, running, window):
            if threshold >= 1:
                chosen = confidence.argmax()[None]
            else:
                chosen = (confidence >= min(threshold, float(confidence.max()))).nonzero()[:, 0]
            canvas.commit(positions[chosen], tokens[chosen], eos_id)
            if not canvas.open.any():
                results[canvas.index] = canvas.answer(eos_id), canvas.steps
        running = [canvas for canvas in running if canvas.open.any()]
    return [results[index] for index in range(len(prompts))]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Exact match in percent and medians over problems that were decoded."""
    return {
        "problems": len(rows),
        "exact_match": round(100 * statistics.mean(row["right"] for row in rows), 1),
        "median_steps": statistics.median(row["steps"] for row in rows),
        "median_tokens": statistics.median(row["tokens"] for row in rows),
    }


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--adapter", type=Path, help="PEFT folder, merged into the weights")
    parser.add_argument("--terse", action="store_true", help="the adapter `terse`'s problems")
    parser.add_argument("--count", type=int, default=200, help="problems over all tasks")
    parser.add_argument("--skip", type=int, default=0, help="leave out the first so many of them")
    parser.add_argument("--prompt-tokens", type=int, help="fill prompts up to about this length")
    parser.add_argument("--threshold", type=float, default=0.9, help="1: one token a step")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--canvas", type=int, default=CANVAS)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="JSONL of every problem's result")
    return parser.parse_args()


def main() -> None:
    """Decode the held-out suite and print exact match and steps per task."""
    args = parse()
    model = load(args.checkpoint, getattr(torch, args.dtype))
    if args.adapter:
        merge(dict(model.named_parameters()), args.adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    if args.terse:
        chosen = list(terse_problems(args.seed, args.count))[args.skip :]
    else:
        chosen = suite(args.seed, args.count, args.prompt_tokens)[args.skip :]
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(
                problem.messages(), tokenize=False, add_generation_prompt=True
            )
        )
        for problem in chosen
    ]
    began = time.monotonic()
    ends = (tokenizer.mask_token_id, tokenizer.eos_token_id)
    decoded = decode(model, prompts, args.canvas, args.window, args.threshold, ends, args.batch)
    rows = []
    for problem, prompt, (ids, steps) in zip(chosen, prompts, decoded, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        row = {"id": problem.id, "task": problem.task, "right": problem.check(text)}
        row |= {"steps": steps, "tokens": len(ids), "prompt_tokens": len(prompt)}
        rows.append(row | {"text": text, "answer": problem.answer})
    by_task = {task: [row for row in rows if row["task"] == task] for task in TASKS}
    for task, members in by_task.items():
        if members:
            print(json.dumps({"task": task, **summary(members)}))
    lengths = statistics.median(row["prompt_tokens"] for row in rows)
    total = {"task": "all", **summary(rows), "median_prompt": lengths}
    print(json.dumps(total | {"seconds": round(time.monotonic() - began)}))
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
