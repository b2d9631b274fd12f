# SPDX-License-Identifier: Apache-2.0
"""Teaches the tiny LLaDA to see, on one CPU core, for a given time; can be stopped and resumed.

First the tower alone, for `--look` minutes: what is on a patch, by the head's own words. Then all.

    python learn.py --run RUN_FOLDER --minutes 75
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lessons import VOCABULARY, MicroBatch, Share, pool
from pictures import COLORS, SHAPES, SQUARES, draw
from publish import publish
from questions import QUESTIONS, some_board
from safetensors.torch import load_file
from seeing import SeenWords, TinyLLaDAV, TowerShape, tile
from shown import loss_of_looking, things_to_find, words_to_compare
from torch import Tensor
from vocabulary import IMAGE

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
from batches import Mix
from model import CONSTANT, Block, Shape
from train import Shared, learning_rate, update
from words import WORDS

TEXT = Path(__file__).resolve().parents[1] / "tiny_llada"
SEEN = SeenWords(*([VOCABULARY[word] for word in words] for words in (SQUARES, COLORS, SHAPES)))

SHOWN = ((things_to_find, 2), (words_to_compare, 8))
"""What is shown at each step, and on how many canvases."""


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of state and log")
    parser.add_argument("--export", type=Path, help="checkpoint folder to keep up to date")
    parser.add_argument("--minutes", type=float, default=75)
    parser.add_argument("--until", type=float, help="stop here, in minutes; the default is the end")
    parser.add_argument("--look", type=float, default=1.5, help="minutes of the tower alone")
    parser.add_argument("--shown", type=float, default=0.0, help="weight of shown.py's loss")
    parser.add_argument("--save-minutes", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-tokens", type=int, default=4000)
    parser.add_argument("--muon-lr", type=float, default=0.005)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--small", type=float, default=0.3, help="share of warm-up questions")
    parser.add_argument("--several", type=float, default=0.3, help="share of conversations")
    parser.add_argument("--canvas", type=float, default=0.1, help="share of whole tails")
    parser.add_argument("--ordered", type=float, default=0.35, help="share of left-to-right masks")
    parser.add_argument("--numbers", type=float, default=0.1, help="share of number-only masks")
    parser.add_argument("--kinds", type=json.loads, default=dict.fromkeys(QUESTIONS, 1.0))
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.until = args.until or args.minutes
    return args


def make_model(seed: int) -> TinyLLaDAV:
    """The tiny LLaDA with a tower that has learnt nothing.

    Squares take the places of words that were labels, colors and shapes of large numbers.
    """
    size = len(VOCABULARY)
    shape = Shape(vocab_size=size, embedding_size=-(-size // 64) * 64)
    model = TinyLLaDAV(shape, TowerShape(), VOCABULARY[IMAGE])
    language = load_file(TEXT / "checkpoint" / "model.safetensors")
    labels = [word for word in WORDS if word not in SHAPES][: len(SQUARES)]
    numbers = [str(99 - index) for index in range(len(COLORS) + len(SHAPES))]
    moved = zip([*SQUARES, *COLORS, *SHAPES], [*labels, *numbers], strict=True)
    taken = {VOCABULARY[new]: VOCABULARY[old] for new, old in moved}
    model.init_weights(seed, language, taken, SEEN)
    return model


def loss_of(model: TinyLLaDAV, batch: MicroBatch, statistics: Tensor) -> Tensor:
    """Weighted sum of cross-entropies; adds counts of hits per kind to `statistics`."""
    hidden = model.hidden(batch.inputs, batch.tiles.bfloat16()).flatten(0, 1)
    logits = model.language.head(hidden.index_select(0, batch.positions)).float()
    loss = (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
    with torch.no_grad():
        hits = (logits.argmax(-1) == batch.targets).float()
        statistics[0] += loss.detach()
        statistics[1] += batch.inputs.numel()
        for kind in range(len(QUESTIONS)):
            at = batch.told == kind
            statistics[2 + kind] += hits[at].sum()
            statistics[2 + len(QUESTIONS) + kind] += at.sum()
    return loss


def naming_loss(
    model: TinyLLaDAV, meaning: Tensor, rng: random.Random, count: int = 16
) -> tuple[Tensor, Tensor]:
    """How far patches' rows are from what they should mean; and the share that is nearest to it."""
    boards = [some_board(rng, held_out=False) for _ in range(count)]
    side = model.tower_shape.image_size
    tiles = torch.stack([tile(draw(things, rng), side) for things in boards])
    rows = model.rows(tiles.bfloat16()).float()
    places, colors, shapes = meaning.split([len(SQUARES), len(COLORS), len(SHAPES)])
    things = [thing for board in boards for thing in board]
    target = places.repeat(count, 1)
    target = target + colors[[list(COLORS).index(color) for color, _ in things]]
    target = target + shapes[[list(SHAPES).index(shape) for _, shape in things]]
    target[:, 0] = CONSTANT
    with torch.no_grad():
        rest = rows.flatten(0, 1) - places.repeat(count, 1)
        pairs = (colors[:, None] + shapes[None]).flatten(0, 1)
        found = torch.cdist(rest[:, 1:], pairs[:, 1:]).argmin(-1)
        wanted = [list(COLORS).index(c) * len(SHAPES) + list(SHAPES).index(s) for c, s in things]
        right = (found == torch.tensor(wanted)).float().mean()
    return F.mse_loss(rows.flatten(0, 1), target), right


def report(statistics: Tensor, state: dict[str, Any], answer_tokens: float) -> dict[str, Any]:
    """One log line from the counts, which are set to zero."""
    sums = statistics.tolist()
    statistics.zero_()
    state["tokens"] += int(sums[1])
    hits, seen = sums[2 : 2 + len(QUESTIONS)], sums[2 + len(QUESTIONS) :]
    told = {
        kind: round(h / max(1.0, n), 4) for kind, h, n in zip(QUESTIONS, hits, seen, strict=True)
    }
    return {
        "step": state["step"],
        "minutes": round(state["seconds"] / 60, 1),
        "tokens": state["tokens"],
        "loss": round(sums[0] / max(1.0, answer_tokens), 4),
        "told": told,
    }


def save(args: argparse.Namespace, model: TinyLLaDAV, shared: Shared, state: Any) -> None:
    """Write the resumable state, and the checkpoint if one is kept."""
    shared.save(args.run, state)
    if args.export:
        publish(args.export, model.shape, model.tower_shape, shared.weights())


def main() -> None:
    """Learn, from the tiny LLaDA or from the run folder's state."""
    args = parse()
    torch.set_num_threads(1)
    args.run.mkdir(parents=True, exist_ok=True)
    model = make_model(args.seed)
    with torch.no_grad():
        meaning = model.meaning(SEEN)  # before training changes the words
    shared = Shared(model, 1, 2 + 2 * len(QUESTIONS))
    state = shared.restore(args.run) or {"step": 0, "seconds": 0.0, "tokens": 0}
    for parameter, view in zip(model.parameters(), shared.views(shared.live), strict=True):
        parameter.data = view
    if not args.no_compile:
        Block.before = torch.compile(Block.before, dynamic=True)  # type: ignore[method-assign]
        Block.after = torch.compile(Block.after, dynamic=True)  # type: ignore[method-assign]
    mix = Mix(args.small, 0, 0, args.canvas, args.ordered, args.numbers)
    share = Share(args.small, args.several, args.kinds)
    sizes = (model.positions, model.tower_shape.image_size)
    (statistics,), gradients = shared.statistics, shared.views(shared.gradients[0])
    saved = logged = began = time.monotonic()
    found = [0.0, 0.0]
    before, answer_tokens, right = state["seconds"], 0.0, 0.0
    while state["seconds"] < 60 * args.until:
        step, minutes = state["step"], state["seconds"] / 60
        looking = minutes < args.look
        if looking:
            loss, share_right = naming_loss(
                model, meaning, random.Random(f"look/{args.seed}/{step}")
            )
            loss.backward()
            right = float(share_right)
            statistics[0] += loss.detach()
            answer_tokens += 1
        else:
            batches, count = pool(args.seed, step, args.step_tokens, share, mix, 2400, sizes)
            answer_tokens += count
            for batch in batches:
                (loss_of(model, batch, statistics) / count).backward()
            if args.shown:
                rng = random.Random(f"shown/{args.seed}/{step}")
                for index, (lessons, number) in enumerate(SHOWN):
                    loss, share_right = loss_of_looking(model, lessons(model, rng, number))
                    (args.shown * loss).backward()
                    found[index] += (float(share_right) - found[index]) / 20
        for total, parameter in zip(gradients, model.parameters(), strict=True):
            if parameter.grad is not None:
                total += parameter.grad
                parameter.grad = None
        rate = learning_rate(minutes / args.minutes) * min(1.0, (step + 1) / 30)
        muon_lr = 0.0 if looking else args.muon_lr * rate
        update(shared, 0, 1, (muon_lr, args.adam_lr * rate), step)
        shared.gradients.zero_()
        shared.live.copy_(shared.master)
        now = time.monotonic()
        state |= {"step": step + 1, "seconds": before + now - began}
        done = state["seconds"] >= 60 * args.until
        if now - logged > 30 or done:
            line = report(statistics, state, answer_tokens)
            if looking:
                line["patches"] = round(right, 4)
            elif args.shown:
                line["shown"] = [round(share, 3) for share in found]
            print(json.dumps(line), flush=True)
            with (args.run / "train_log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            logged, answer_tokens = now, 0.0
        if now - saved > 60 * args.save_minutes or done:
            save(args, model, shared, state)
            saved = now


if __name__ == "__main__":
    main()
