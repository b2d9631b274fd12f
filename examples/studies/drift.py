# SPDX-License-Identifier: Apache-2.0
"""Where hidden states move between denoising steps, and what is attended."""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoTokenizer

from vllm_elastic.bench.arguments import add_json, add_model, add_prompts
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.reference import LLaDA
from vllm_elastic.reference.canvas import Canvas
from vllm_elastic.reference.commit import CommitOptions, candidates, choose

REGIONS = ("prompt", "settled answer", "recent answer", "just committed", "window", "tail")
DISTANCES = (1, 2, 4, 8, 16, 32, 64)  # from a commit, up to and with
RECENT = 16  # denoising steps for which a committed position is recent


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Decodes prompts with the plain PyTorch oracle, everything recomputed at every "
        "step, and compares the hidden states at each layer's input with those of some steps "
        "before. Nothing is cached, so nothing is disturbed by stale state.",
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--count", type=int, default=10, metavar="N")
    parser.add_argument("--ages", nargs="+", type=int, default=[1, 2, 4, 8, 16], metavar="STEPS")
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--max-tokens", type=int, default=256)
    add_json(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print relative changes by region and by distance from commits, and attention by region."""
    model = LLaDA.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    sums: dict[tuple[str, str, int, int], list[float]] = defaultdict(lambda: [0.0, 0])
    for request in list(read_jsonl(args.prompts))[: args.count]:
        prompt = request.get("prompt_token_ids") or tokenizer.encode(
            request["prompt"], add_special_tokens=False
        )
        for key, value in measure(model, prompt, args):
            sums[key][0] += value
            sums[key][1] += 1
    means = {key: total / count for key, (total, count) in sums.items()}
    layers = range(model.config.n_layers)
    heads = " | ".join(f"layer {layer}" for layer in layers)
    print(f"Relative change of the input of each layer\n\n| region | age | {heads} |")
    print("|---|---" + "|---" * len(layers) + "|")
    for region in REGIONS:
        for age in args.ages:
            values = [means.get(("drift", region, age, layer)) for layer in layers]
            if None not in values:
                print(f"| {region} | {age} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    print(
        "\nRelative change in one step, outside the window, by distance from the nearest token "
        f"that the step before committed\n\n| distance up to | {heads} |"
    )
    print("|---" + "|---" * len(layers) + "|")
    for distance in DISTANCES:
        values = [means.get(("near", str(distance), 1, layer)) for layer in layers]
        if None not in values:
            print(f"| {distance} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    print(f"\nShare of the window's attention\n\n| region | {heads} |")
    print("|---" + "|---" * len(layers) + "|")
    for region in REGIONS:
        values = [means.get(("attention", region, 0, layer), 0.0) for layer in layers]
        print(f"| {region} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    if args.json is not None:
        names = ("quantity", "region", "age", "layer")
        rows = [
            {**dict(zip(names, key, strict=True)), "value": value} for key, value in means.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1))


def measure(
    model: Any, prompt: list[int], args: argparse.Namespace
) -> Iterator[tuple[tuple[str, str, int, int], float]]:
    """((quantity, region, age, layer), value) of every step of one prompt's decoding."""
    canvas = Canvas(model, prompt, args.max_tokens)
    committed_at = torch.full((len(canvas),), torch.iinfo(torch.int64).max)
    committed_at[: len(prompt)] = -1
    history: list[torch.Tensor] = []
    while len(window := canvas.window(args.window)):
        step = len(history)
        inputs, hidden = [], model.embed(canvas.tokens)
        regions = regions_of(committed_at, len(prompt), window, step)
        for layer in range(model.config.n_layers):
            inputs.append(hidden)
            q, k, v = model.project(layer, hidden, canvas.everywhere)
            attention = model.attention_rows(q[:, window], k).mean(dim=(0, 1))
            for region, where in regions.items():
                yield ("attention", region, 0, layer), float(attention[where].sum())
            hidden = model.finish(layer, hidden, model.attend(q, k, v))
        history.append(torch.stack(inputs))
        for age in args.ages:
            if age > step:
                continue
            for region, layer, value in changes(history[step - age], history[step], regions):
                yield ("drift", region, age, layer), value
        if step:
            near = distances_of(committed_at, window, step)
            for distance, layer, value in changes(history[step - 1], history[step], near):
                yield ("near", str(distance), 1, layer), value
        token_ids, confidence = candidates(model.head(hidden[window]), model.config.mask_token_id)
        chosen = choose(confidence, window, CommitOptions(threshold=args.threshold))
        canvas.commit(window[chosen], token_ids[chosen])
        committed_at[window[chosen]] = step


def changes(old: Any, new: Any, parts: dict[Any, Any]) -> Iterator[tuple[Any, int, float]]:
    """(part, layer, mean relative change) of hidden states [L, T, d]; parts bool [T], by name."""
    change = (new - old).norm(dim=-1) / old.norm(dim=-1)
    for name, where in parts.items():
        if where.any():
            for layer, value in enumerate(change[:, where].mean(dim=1).tolist()):
                yield name, layer, value


def distances_of(committed_at: Any, window: Any, step: int) -> dict[int, Any]:
    """bool [T] for each of ``DISTANCES``: further than the one before it; outside the window."""
    positions = torch.arange(len(committed_at))
    just = (committed_at == step - 1).nonzero().flatten()
    nearest = (positions[:, None] - just).abs().min(dim=1).values
    nearest[window] = 0
    bounds = (0, *DISTANCES)
    return {
        last: (nearest > first) & (nearest <= last) for first, last in itertools.pairwise(bounds)
    }


def regions_of(committed_at: Any, prompt_length: int, window: Any, step: int) -> dict[str, Any]:
    """bool [T] for each of ``REGIONS``; they part the canvas."""
    positions = torch.arange(len(committed_at))
    in_window = torch.isin(positions, window)
    answer = (positions >= prompt_length) & (committed_at < step)
    just = answer & (committed_at == step - 1)
    settled = answer & (committed_at < step - RECENT)
    return {
        "prompt": positions < prompt_length,
        "settled answer": settled,
        "recent answer": answer & ~settled & ~just,
        "just committed": just,
        "window": in_window,
        "tail": (positions >= prompt_length) & ~answer & ~in_window,
    }


if __name__ == "__main__":
    main(make_parser().parse_args())
