# SPDX-License-Identifier: Apache-2.0
"""What a long image costs each policy: passes, and row-layers on the image's positions."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from vllm_elastic.bench.arguments import add_json, add_model, add_prompts
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.run import read_jsonl

POLICIES: dict[str, dict[str, Any]] = {
    "no cache (`exact`)": {"preset": "exact"},
    "**`block`**": {"preset": "block"},
    "`dual-cache`": {"policy": "dual-cache"},
    "`published`": {"preset": "published"},
}
SPELLED, NOISE = "spelled", "noise"
TILE, PATCH, TOWER_WIDTH = 384, 14, 32  # LLaDA-V's tiles; a tower of no consequence
PHOTO = (640, 480)  # 2,929 positions
# LLaDA-V's names of LLaDA's tensors.
NAMES = {
    "model.transformer.blocks.": "model.layers.",
    "model.transformer.wte.": "model.embed_tokens.",
    "model.transformer.ln_f.": "model.norm.",
    "model.transformer.ff_out.": "lm_head.",
    ".attn_out.": ".self_attn.o_proj.",
    ".ff_proj.": ".mlp.gate_proj.",
    ".up_proj.": ".mlp.up_proj.",
    ".ff_out.": ".mlp.down_proj.",
    ".attn_norm.": ".input_layernorm.",
    ".ff_norm.": ".post_attention_layernorm.",
    **{f".{name}_proj.": f".self_attn.{name}_proj." for name in "qkv"},
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Gives a LLaDA images and counts what each policy computes of them. No LLaDA-V "
        f"was at hand that could see, so an image is one of two stand-ins. '{SPELLED}': all of a "
        "prompt but its end, as the embeddings of its tokens, which the model can read; every "
        "answer is also asked for as text, and has to be the same. "
        f"'{NOISE}': a picture of noise of {PHOTO[0]} x {PHOTO[1]} pixels through a random tower, "
        "in front of the prompt; nothing in it can be read.",
    )
    add_model(parser)
    add_prompts(parser)
    parser.add_argument("--image", choices=(SPELLED, NOISE), default=SPELLED)
    parser.add_argument("--count", type=int, default=10, metavar="N")
    parser.add_argument("--text", type=int, default=40, metavar="TOKENS", help="left as text")
    parser.add_argument("--max-tokens", type=int, default=256)
    add_json(parser)
    return parser


def main(args: argparse.Namespace) -> None:
    """Print a row for each policy."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    asked = list(read_jsonl(args.prompts))[: args.count]
    with tempfile.TemporaryDirectory() as folder:
        write_llada_v(args.model, Path(folder))
        engine = BenchEngine(
            folder, kv_cache_memory_bytes=400 << 20, row_budget=4096, enable_mm_embeds=True
        )
        rows = [measure(engine, tokenizer, asked, name, args) for name in POLICIES]
    positions = rows[0]["image_positions"]
    print(f"Image: {args.image}, {positions:.0f} positions; a canvas of {args.max_tokens}.\n")
    print(
        "| setting | right answers | as without a cache | passes | passes that compute more than a "
        "tenth of the image | row-layers a token | of them the image's |"
    )
    print("|---" * 7 + "|")
    for row in rows:
        print(
            f"| {row['setting']} | {row['right']}/{len(asked)} | "
            f"{sum(map(str.__eq__, row['texts'], rows[0]['texts']))}/{len(asked)} | "
            f"{row['passes']:.1f} | {row['image_passes']:.1f} | {row['row_layers']:.0f} | "
            f"{row['of_image']:.0f} |"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def measure(
    engine: BenchEngine, tokenizer: Any, asked: Sequence[Any], name: str, args: argparse.Namespace
) -> dict[str, Any]:
    """One policy's figures, means of all prompts.

    Raises:
        SystemExit: a spelled image and the text that it spells give different answers.
    """
    knobs = {f"elastic_{key}": value for key, value in POLICIES[name].items()}
    knobs["max_tokens"] = args.max_tokens
    texts, totals, right = [], Counter[str](), 0
    for request in asked:
        token_ids = tokenizer.encode(request["prompt"], add_special_tokens=False)
        with counted(engine) as counts:
            (result,) = engine.run([knobs | with_image(engine, token_ids, args)])
        if args.image == SPELLED:
            (read,) = engine.run([knobs | {"prompt_token_ids": token_ids}])
            if (read["token_ids"], read["steps"]) != (result["token_ids"], result["steps"]):
                raise SystemExit(f"{name}: the image is not read as the text is: {request['id']}")
        totals += counts
        totals["passes"] += result["passes"]
        totals["row_layers"] += result["row_layers"]
        totals["tokens"] += max(1, len(result["token_ids"]))
        texts.append(result["text"].strip())
        right += texts[-1] == str(request.get("answer")).strip()
    return {
        "setting": name,
        "right": right,
        "texts": texts,
        "image_positions": totals["image"] / len(asked),
        "passes": totals["passes"] / len(asked),
        "image_passes": totals["image_passes"] / len(asked),
        "row_layers": totals["row_layers"] / totals["tokens"],
        "of_image": totals["of_image"] / totals["tokens"],
    }


def with_image(engine: BenchEngine, token_ids: list[int], args: argparse.Namespace) -> Any:
    """A prompt's stand-in for an image, and its text."""
    model = engine.runner.model
    placeholder = engine.llm.llm_engine.vllm_config.model_config.hf_config.image_token_id
    if args.image == NOISE:
        image: Any = Image.effect_noise(PHOTO, 80).convert("RGB")
        left = token_ids
    else:
        with torch.inference_mode():
            image = [model.embed_tokens(torch.tensor(token_ids[: -args.text]))]
        left = token_ids[-args.text :]
    return {"prompt_token_ids": [placeholder, *left], "multi_modal_data": {"image": image}}


@contextmanager
def counted(engine: BenchEngine) -> Iterator[Counter[str]]:
    """Counts what passes compute of images while it is open.

    Yields:
        ``image`` positions, ``of_image`` row-layers on them, ``image_passes`` that compute more
        than a tenth of them in some layer.
    """
    counts = Counter[str]()
    runner, layers = engine.runner, engine.num_layers
    run = runner.run

    def counting(plans: Sequence[Any]) -> Any:
        for plan in plans:
            rows = [
                (segment.join_layer, int(np.isin(segment.positions, plan.stored_inputs).sum()))
                for segment in plan.segments
            ]
            counts["of_image"] += sum(number * (layers - join) for join, number in rows)
            counts["image_passes"] += sum(n for _, n in rows) > len(plan.stored_inputs) / 10
            counts["image"] = len(plan.stored_inputs)
        return run(plans)

    runner.run = counting
    try:
        yield counts
    finally:
        del runner.run


def write_llada_v(model: Path, folder: Path) -> None:
    """A LLaDA's checkpoint as a LLaDA-V's, with a random tower of LLaDA-V's geometry."""
    config = json.loads((model / "config.json").read_text())
    weights = {}
    for shard in model.glob("*.safetensors"):
        for name, weight in load_file(shard).items():
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            weights[name] = weight.float()
    torch.manual_seed(0)
    weights |= random_tower(config["d_model"], weights["model.embed_tokens.weight"].std().item())
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / "model.safetensors")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (folder / file).write_bytes((model / file).read_bytes())
    # Any token that no prompt has will do for the placeholder.
    placeholder = AutoTokenizer.from_pretrained(model).unk_token_id
    taken = {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "max_sequence_length": 4096,
        "image_token_id": placeholder,
        "never_chosen_ids": [],
        "vision_config": {
            "hidden_size": TOWER_WIDTH,
            "intermediate_size": TOWER_WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": PATCH,
        },
    }
    (folder / "config.json").write_text(json.dumps(config | taken))


def random_tower(width: int, deviation: float) -> dict[str, torch.Tensor]:
    """Tower, projector and newline; their rows have the deviation of the model's embeddings."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=TOWER_WIDTH,
            intermediate_size=TOWER_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=TILE,
            patch_size=PATCH,
        )
    )
    weights = {
        f"model.vision_tower.vision_tower.vision_model.{name.removeprefix('vision_model.')}": weight
        for name, weight in tower.state_dict().items()
        if "head." not in name and "encoder.layers.1." not in name
    }
    seen = tower(torch.randn(4, 3, TILE, TILE), output_hidden_states=True).hidden_states[-2]
    first = torch.randn(width, TOWER_WIDTH) / seen.std() / TOWER_WIDTH**0.5
    second = torch.randn(width, width) / width**0.5
    made = torch.nn.functional.gelu(seen @ first.T) @ second.T
    weights["model.mm_projector.0.weight"] = first
    weights["model.mm_projector.0.bias"] = torch.zeros(width)
    weights["model.mm_projector.2.weight"] = second * (deviation / made.std())
    weights["model.mm_projector.2.bias"] = torch.zeros(width)
    weights["model.image_newline"] = torch.randn(width) * deviation
    return {name: weight.detach() for name, weight in weights.items()}


if __name__ == "__main__":
    main(make_parser().parse_args())
