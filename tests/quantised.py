# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints of LLaDAs and Llama-likes, packed as the formats' descriptions say.

Weights are rounded to the nearest step of their group, without calibration. Formats: GPTQ and AWQ
(4 bits, Hugging Face's AutoGPTQ and AutoAWQ layouts), compressed-tensors with 8 bits for weights
and activations, or 4 bits for weights alone.

    python -m tests.quantised examples/tiny_llada/checkpoint out/int8 int8
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
LAYERS = (
    *("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"),
    *("o_proj", "gate_proj", "down_proj"),
)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

FOUR_BITS = ("gptq", "awq", "packed")

Format = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
"""A linear layer's weight [N, K] -> its tensors, and the weight that they stand for."""


def _pack(values: Tensor) -> Tensor:
    """Eight numbers of 4 bits to an int32, along the last dimension, lowest bits first."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    words = (eights << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _symmetric(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 0..15 around 8 [N, K], a scale for each group [N, K / GROUP], what they stand for."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    scales = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    steps = (groups / scales[..., None].float()).round().clamp(-8, 7)
    return (steps + 8).flatten(1), scales, (steps * scales[..., None].float()).flatten(1)


def gptq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    steps, scales, stands_for = _symmetric(weight)
    zeros = torch.full(scales.T.shape, 7)  # a zero point of 8, which AutoGPTQ stores less one
    return {
        "qweight": _pack(steps).T.contiguous(),
        "qzeros": _pack(zeros),
        "scales": scales.T.contiguous(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).to(torch.int32),
    }, stands_for


def awq(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.float().unflatten(-1, (-1, GROUP))
    least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = ((most - least) / 15).to(torch.bfloat16)
    zeros = (-least / scales.float()).round().clamp(0, 15)
    steps = (groups / scales[..., None].float() + zeros[..., None]).round().clamp(0, 15)
    stands_for = ((steps - zeros[..., None]) * scales[..., None].float()).flatten(1)

    def in_order(values: Tensor) -> Tensor:
        return _pack(values.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2))

    return {
        "qweight": in_order(steps.flatten(1).T),
        "qzeros": in_order(zeros.T),
        "scales": scales.T.contiguous(),
    }, stands_for


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.float().abs().amax(-1, keepdim=True) / 127
    steps = (weight.float() / scales).round().clamp(-127, 127)
    return {"weight": steps.to(torch.int8), "weight_scale": scales}, steps * scales


def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    steps, scales, stands_for = _symmetric(weight)
    shape = torch.tensor(weight.shape)
    return {
        "weight_packed": _pack(steps),
        "weight_scale": scales,
        "weight_shape": shape,
    }, stands_for


def _compressed(form: str, weights: dict[str, Any], inputs: dict[str, Any] | None) -> Any:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "model.transformer.ff_out"],
    }


_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_CHANNELS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_GROUPS = _CHANNELS | {"num_bits": 4, "strategy": "group", "group_size": GROUP}

FORMATS: dict[str, tuple[Format, dict[str, Any]]] = {
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True},
    ),
    "int8": (int8, _compressed("int-quantized", _CHANNELS, _TOKENS)),
    "packed": (packed, _compressed("pack-quantized", _GROUPS, None)),
}
"""What becomes of a layer, and ``quantization_config`` of config.json."""


def quantise(
    source: Path,
    directory: Path,
    name: str,
    *,
    left: Collection[str] = (),
    beside: Mapping[str, Tensor] | None = None,
    **said: Any,
) -> dict[str, Tensor]:
    """A checkpoint's linear layers in a format, all else as it was; what all of them stand for.

    The head is none of them, as is usual.

    Args:
        left: layers that stay as they were.
        beside: tensors that the source does not have.
        said: of ``quantization_config``, beside what the format has.

    Returns:
        float32 by the source's own names.
    """
    form, config = FORMATS[name]
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    stands_for: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for full_name, weight in load_file(file).items():
            path, _, kind = full_name.rpartition(".")
            in_block = path.startswith(("model.layers.", "model.transformer.blocks."))
            module = path.rpartition(".")[2]
            if path in left or not (kind == "weight" and in_block and module in LAYERS):
                tensors[full_name], stands_for[full_name] = weight, weight.float()
                continue
            own, stands_for[full_name] = form(weight)
            tensors |= {f"{path}.{suffix}": tensor for suffix, tensor in own.items()}
    tensors |= beside or {}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    raw["quantization_config"] = config | said
    (directory / "config.json").write_text(json.dumps(raw))
    return stands_for


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkpoint's directory")
    parser.add_argument("directory", type=Path, help="where the quantised one goes")
    parser.add_argument("format", choices=list(FORMATS))
    parser.add_argument(
        "--written-out", action="store_true", help="what the weights stand for, in bfloat16"
    )
    return parser


if __name__ == "__main__":
    args = make_parser().parse_args()
    stands_for = quantise(args.source, args.directory, args.format)
    if args.written_out:
        plain = {name: weight.to(torch.bfloat16) for name, weight in stands_for.items()}
        save_file(plain, args.directory / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(args.source / "config.json", args.directory)
