# SPDX-License-Identifier: Apache-2.0
"""Trains the adapter `terse` on one CPU core, for a given time: tables answered by values alone.

The loss and the masks are those of `train.py`; the model's own weights are frozen. Most masks are
left-to-right ones, and steps are small: with larger ones, a share of 0.3 and tables of up to 8
names the loss fell more slowly. Which of the three counts was not tried apart. All is float32: not
every CPU is faster in bfloat16.

    OMP_NUM_THREADS=1 python train_adapter.py --minutes 7.5
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from batches import Mix, pool
from lora import attach, save
from model import Block, load
from tasks import TASKS, terse_conversation
from torch import nn
from train import ADAM_BETAS, learning_rate, loss_of

HERE = Path(__file__).parent
CLIP = 1.0  # of the gradient's norm: a lookup that is just being found has steep ones


def parse() -> argparse.Namespace:
    """Command line; the defaults are those of the shipped adapter."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--out", type=Path, default=HERE / "terse", help="PEFT folder to write")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-tokens", type=int, default=800)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--canvas", type=float, default=0.004, help="share of full EOS tails")
    parser.add_argument("--ordered", type=float, default=0.9, help="share of left-to-right masks")
    parser.add_argument("--no-compile", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Train; print a line and write the folder every 20 seconds and at the end."""
    args = parse()
    torch.set_num_threads(1)
    model = load(args.checkpoint)
    adapted = attach(model, args.seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not args.no_compile:
        Block.before = torch.compile(Block.before, dynamic=True)  # type: ignore[method-assign]
        Block.after = torch.compile(Block.after, dynamic=True)  # type: ignore[method-assign]
    adam = torch.optim.Adam(trained, lr=args.lr, betas=ADAM_BETAS)
    mix = Mix(0, 0, 0, canvas=args.canvas, ordered=args.ordered, numbers=0)
    counts = torch.zeros(3 + 2 * len(TASKS))  # see `loss_of`
    table = 3 + list(TASKS).index("table")
    began = logged = time.monotonic()
    step, answer_tokens = 0, 0.0
    while (seconds := time.monotonic() - began) < 60 * args.minutes:
        pieces, count = pool(args.seed, step, args.step_tokens, mix, 2400, terse_conversation)
        for piece in pieces:
            (loss_of(model, piece, counts) / count).backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        rate = learning_rate(seconds / 60 / args.minutes) * min(1.0, (step + 1) / 30)
        adam.param_groups[0]["lr"] = args.lr * rate
        adam.step()
        adam.zero_grad()
        step, answer_tokens = step + 1, answer_tokens + count
        if time.monotonic() - logged > 20:
            line = {
                "step": step,
                "seconds": round(time.monotonic() - began),
                "loss": round(float(counts[0]) / answer_tokens, 4),
                "tokens": int(counts[1]),
                "frontier": round(float(counts[table] / counts[table + len(TASKS)]), 4),
            }
            print(json.dumps(line), flush=True)
            logged, answer_tokens = time.monotonic(), 0.0
            counts.zero_()
            save(args.out, adapted, "tiny_llada")
    save(args.out, adapted, "tiny_llada")
    print(json.dumps({"steps": step, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
