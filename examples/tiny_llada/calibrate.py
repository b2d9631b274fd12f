"""Temperature scaling of a trained checkpoint: a probability of 0.9 comes to mean what it says.

A masked model is trained on single positions, and is judged by whole answers: of a hundred tokens
that are each committed at 0.9 or a little more, several are wrong. Scaling the head by a factor
below 1 leaves every prediction as it is and lowers its probability (temperature scaling, Guo et
al., arXiv 1706.04599). The factor is chosen on development problems, held out like the suite's and
with another seed:

    python calibrate.py --checkpoint checkpoint --factors 1 0.5 0.375   # accuracy and steps at each
    python calibrate.py --checkpoint checkpoint --write 0.375           # scale the head, once
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from evaluate import decode
from heldout import CANVAS, suite
from model import load
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

DEVELOPMENT_SEED = 11
HEADS = ("model.transformer.ff_out.weight", "lm_head.weight")  # LLaDA's name, LLaDA-V's
SCALED = "head_scaled_by"  # in the file's metadata, so that no head is scaled twice


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--factors", type=float, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=40, help="development problems")
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--write", type=float, help="scale the checkpoint's head by this factor")
    return parser.parse_args()


def measure(args: argparse.Namespace) -> None:
    """Print exact match and median steps on the development problems at each factor."""
    model = load(args.checkpoint, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    problems = suite(DEVELOPMENT_SEED, args.count, args.prompt_tokens)
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(p.messages(), tokenize=False, add_generation_prompt=True)
        )
        for p in problems
    ]
    ends = (tokenizer.mask_token_id, tokenizer.eos_token_id)
    head = model.model["transformer"]["ff_out"].weight
    trained = head.data.clone()
    for factor in args.factors:
        head.data = trained * factor
        decoded = decode(model, prompts, CANVAS, 16, args.threshold, ends, 20)
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in decoded]
        right = statistics.mean(p.check(text) for p, text in zip(problems, texts, strict=True))
        steps = statistics.median(steps for _, steps in decoded)
        row = {"factor": factor, "exact_match": round(100 * right, 1), "median_steps": steps}
        print(json.dumps(row), flush=True)


def write(checkpoint: Path, factor: float) -> None:
    """Scale the head in the file.

    Raises:
        SystemExit: it has been scaled before.
    """
    path = checkpoint / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if SCALED in metadata:
        raise SystemExit(f"{path}: the head was scaled by {metadata[SCALED]} already")
    weights = load_file(path)
    (head,) = weights.keys() & set(HEADS)
    weights[head] = weights[head] * factor
    save_file(weights, path, metadata={**metadata, SCALED: str(factor)})
    path.chmod(0o644)


def main() -> None:
    """Measure, and write if asked to."""
    args = parse()
    if args.factors:
        measure(args)
    if args.write is not None:
        write(args.checkpoint, args.write)


if __name__ == "__main__":
    main()
