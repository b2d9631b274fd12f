# SPDX-License-Identifier: Apache-2.0
"""Trains the tiny LLaDA on two CPU cores, for a given time; can be stopped and resumed.

Two single-threaded workers share float32 master weights, bf16 working weights and gradients.
Both make the same pool of micro-batches and take them from a shared counter, so a core that other
work slows down simply takes fewer. The learning rate follows the elapsed share of `--minutes`.

    python train.py --run RUN_FOLDER --minutes 90
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from batches import VOCABULARY, MicroBatch, Mix, pool
from export import export
from model import Block, Shape, TinyLLaDA
from safetensors.torch import load_file
from tasks import TASKS, WEIGHTS
from torch import Tensor, nn

MUON_MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.98)
RESUMED = ("master", "momentum", "second")


def parse() -> argparse.Namespace:
    """Command line; learning rates and shares are those of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of state and log")
    parser.add_argument("--export", type=Path, help="checkpoint folder to keep up to date")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights a new run starts from")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--until", type=float, help="stop here, in minutes; the default is the end")
    parser.add_argument("--save-minutes", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step-tokens", type=int, default=8000)
    parser.add_argument("--muon-lr", type=float, default=0.005)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--small", type=float, default=0.25, help="share of warm-up problems")
    parser.add_argument("--packed", type=float, default=0.3, help="share of packed conversations")
    parser.add_argument("--long", type=float, default=0.25, help="share of long ones among them")
    parser.add_argument("--canvas", type=float, default=0.12, help="share of full EOS tails")
    parser.add_argument("--ordered", type=float, default=0.3, help="share of left-to-right masks")
    parser.add_argument("--numbers", type=float, default=0.3, help="share of number-only masks")
    parser.add_argument("--tasks", type=json.loads, help="how often each is drawn: JSON")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.until = args.until or args.minutes
    return args


def learning_rate(progress: float) -> float:
    """Share of the peak: constant for a third of the time, then linear to zero."""
    return min(1.0, max(0.0, (1 - progress) * 1.5))


def orthogonal(x: Tensor) -> Tensor:
    """Muon's five Newton-Schulz steps on a stack of matrices [count, rows <= columns]."""
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.float()


class Shared:
    """A model's weights and the optimiser's state as flat tensors in shared memory, with views.

    Args:
        model: its initial weights are copied.
        counts: statistics that each worker keeps.
    """

    def __init__(self, model: nn.Module, workers: int, counts: int) -> None:
        self.layout = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        size = sum(p.numel() for p in model.parameters())
        self.master, self.momentum, self.second = (torch.zeros(size).share_memory_() for _ in "123")
        self.live = torch.zeros(size, dtype=torch.bfloat16).share_memory_()
        self.gradients = torch.zeros(workers, size).share_memory_()
        self.statistics = torch.zeros(workers, counts).share_memory_()
        for view, parameter in zip(self.views(self.master), model.parameters(), strict=True):
            view.copy_(parameter.data)
        self.live.copy_(self.master)

    def views(self, flat: Tensor) -> list[Tensor]:
        """One view per parameter, in the layout's order."""
        sizes = [math.prod(shape) for _, shape in self.layout]
        parts = flat.split(sizes)
        return [part.view(shape) for part, (_, shape) in zip(parts, self.layout, strict=True)]

    def weights(self) -> dict[str, Tensor]:
        """bf16 weights by name."""
        named = zip(self.layout, self.views(self.live), strict=True)
        return {name: view.clone() for (name, _), view in named}

    def save(self, run: Path, state: dict[str, Any]) -> None:
        """Write what a run resumes from, and how far it is, into its folder."""
        tensors = {name: getattr(self, name) for name in RESUMED}
        torch.save({**tensors, "state": state}, run / "state.tmp")
        os.replace(run / "state.tmp", run / "state.pt")

    def restore(self, run: Path) -> dict[str, Any] | None:
        """Read what `save` wrote and return how far the run is; None for a run that is new."""
        if not (run / "state.pt").exists():
            return None
        stored = torch.load(run / "state.pt")
        for name in RESUMED:
            getattr(self, name).copy_(stored[name])
        self.live.copy_(self.master)
        state: dict[str, Any] = stored["state"]
        return state


def loss_of(model: TinyLLaDA, batch: MicroBatch, statistics: Tensor) -> Tensor:
    """Weighted sum of cross-entropies; adds counts of hits per task to `statistics`."""
    hidden = model.hidden(batch.inputs).flatten(0, 1)
    logits = model.head(hidden.index_select(0, batch.positions)).float()
    loss = (F.cross_entropy(logits, batch.targets, reduction="none") * batch.weights).sum()
    with torch.no_grad():
        hits = (logits.argmax(-1) == batch.targets).float()
        statistics[0] += loss.detach()
        statistics[1] += batch.inputs.numel()
        for task in range(len(TASKS)):
            at = batch.frontier & (batch.tasks == task)
            statistics[3 + task] += hits[at].sum()
            statistics[3 + len(TASKS) + task] += at.sum()
    return loss


def update(shared: Shared, rank: int, workers: int, rates: tuple[float, float], step: int) -> None:
    """This worker's share of the optimiser step: Muon on matrices, AdamW on the rest."""
    gradient = shared.gradients.sum(0) if workers > 1 else shared.gradients[0]
    parts = [shared.views(t) for t in (gradient, shared.master, shared.momentum, shared.second)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (name, shape) in enumerate(shared.layout):
        if ".blocks." in name and len(shape) == 2:
            groups.setdefault(shape, []).append(index)
        elif index % workers == rank:
            g, p, m, v = (part[index] for part in parts)
            m.lerp_(g, 1 - ADAM_BETAS[0])
            v.lerp_(g.square(), 1 - ADAM_BETAS[1])
            corrected = m / (1 - ADAM_BETAS[0] ** (step + 1))
            scale = (v / (1 - ADAM_BETAS[1] ** (step + 1))).sqrt() + 1e-8
            p.sub_(rates[1] * corrected / scale)
    for shape, members in groups.items():
        mine = members[rank::workers]
        for index in mine:
            parts[2][index].mul_(MUON_MOMENTUM).add_(parts[0][index])
        nesterov = [parts[0][i] + MUON_MOMENTUM * parts[2][i] for i in mine]
        stack = torch.stack([g.mT if shape[0] > shape[1] else g for g in nesterov])
        change = orthogonal(stack)
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for index, matrix in zip(mine, change, strict=True):
            matrix = matrix.mT if shape[0] > shape[1] else matrix
            parts[1][index].sub_(matrix, alpha=rates[0] * scale)


def report(shared: Shared, state: dict[str, Any], answer_tokens: float) -> dict[str, Any]:
    """One log line from the workers' counts, which are set to zero."""
    sums = shared.statistics.sum(0).tolist()
    shared.statistics.zero_()
    hits, seen = sums[3 : 3 + len(TASKS)], sums[3 + len(TASKS) :]
    state["tokens"] += sums[1]
    return {
        "step": state["step"],
        "minutes": round(state["seconds"] / 60, 1),
        "tokens": int(state["tokens"]),
        "loss": round(sums[0] / max(1.0, answer_tokens), 4),
        "frontier": {
            task: round(h / max(1.0, n), 4) for task, h, n in zip(TASKS, hits, seen, strict=False)
        },
    }


def worker(
    rank: int,
    args: argparse.Namespace,
    shape: Shape,
    shared: Shared,
    state: Any,
    barrier: Any,
    counter: Any,
) -> None:
    """Training loop of one core."""
    torch.set_num_threads(1)
    if args.tasks:
        WEIGHTS.clear()
        WEIGHTS.update(args.tasks)
    model = TinyLLaDA(shape)
    for parameter, view in zip(model.parameters(), shared.views(shared.live), strict=True):
        parameter.data = view
    if not args.no_compile:
        Block.before = torch.compile(Block.before, dynamic=True)  # type: ignore[method-assign]
        Block.after = torch.compile(Block.after, dynamic=True)  # type: ignore[method-assign]
    mix = Mix(args.small, args.packed, args.long, args.canvas, args.ordered, args.numbers)
    own = shared.views(shared.gradients[rank])
    saved = logged = began = time.monotonic()
    start_seconds, answer_tokens = state["seconds"], 0.0
    while True:
        step, progress = state["step"], state["seconds"] / 60 / args.minutes
        if state["seconds"] / 60 >= args.until:
            break
        batches, count = pool(args.seed, step, args.step_tokens, mix, 2400)
        answer_tokens += count
        while True:
            with counter.get_lock():
                mine = counter.value
                counter.value += 1
            if mine >= len(batches):
                break
            (loss_of(model, batches[mine], shared.statistics[rank]) / count).backward()
            for total, parameter in zip(own, model.parameters(), strict=True):
                total += parameter.grad
                parameter.grad = None
        barrier.wait()
        rate = learning_rate(progress) * min(1.0, (step + 1) / 30)
        update(shared, rank, args.workers, (args.muon_lr * rate, args.adam_lr * rate), step)
        barrier.wait()
        shared.gradients[rank].zero_()
        if rank == 0:
            shared.live.copy_(shared.master)
            counter.value = 0
            now = time.monotonic()
            state["step"] = step + 1
            state["seconds"] = start_seconds + now - began
            done = state["seconds"] / 60 >= args.until
            if now - logged > 40 or done:
                line = report(shared, state, answer_tokens)
                print(json.dumps(line), flush=True)
                with (args.run / "train_log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
                logged, answer_tokens = now, 0.0
            if now - saved > 60 * args.save_minutes or done:
                save(args, model.shape, shared, dict(state))
                saved = now
        barrier.wait()


def save(args: argparse.Namespace, shape: Shape, shared: Shared, state: dict[str, Any]) -> None:
    """Write the resumable state, and the checkpoint if one is kept."""
    shared.save(args.run, state)
    if args.export:
        export(args.export, shape, shared.weights())


def main() -> None:
    """Start the workers, from scratch or from the run folder's state."""
    args = parse()
    torch.set_num_threads(1)
    args.run.mkdir(parents=True, exist_ok=True)
    size = len(VOCABULARY)
    shape = Shape(vocab_size=size, embedding_size=-(-size // 64) * 64)
    model = TinyLLaDA(shape)
    model.init_weights(args.seed)
    shared = Shared(model, args.workers, 3 + 3 * len(TASKS))
    progress = {"step": 0, "seconds": 0.0, "tokens": 0.0}
    if stored := shared.restore(args.run):
        progress = stored
    elif args.init:
        weights = load_file(args.init / "model.safetensors")
        for (name, _), view in zip(shared.layout, shared.views(shared.master), strict=True):
            view.copy_(weights[name])
        shared.live.copy_(shared.master)
    elif args.export:
        export(args.export, shape, shared.weights())
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        state = manager.dict(progress)
        counter, barrier = context.Value("i", 0), context.Barrier(args.workers)
        arguments = (args, shape, shared, state, barrier, counter)
        workers = [
            context.Process(target=worker, args=(rank, *arguments), daemon=True)
            for rank in range(args.workers)
        ]
        # Ending on SIGTERM takes the workers along: else they go on, and slow what comes next.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        for process in workers:
            process.start()
        for process in workers:
            process.join()
        if any(process.exitcode for process in workers):
            raise SystemExit("a worker failed")
    if args.export:
        export(args.export, shape, shared.weights())


if __name__ == "__main__":
    main()
