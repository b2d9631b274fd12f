# SPDX-License-Identifier: Apache-2.0
"""Random adapters (LoRA) as PEFT writes them, and the weights that a model has with one merged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


def write_adapter(
    directory: Path,
    weights: Mapping[str, Tensor],
    changes: Callable[[str], bool],
    *,
    rank: int = 4,
    alpha: int = 8,
    size: float = 1.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Write an adapter; returns the changed weights, by their checkpoint's names.

    Args:
        weights: of a checkpoint [out, in], by its names.
        changes: whether the adapter changes the layer of that name.
        size: deviation of what it adds, where a layer's inputs have deviation 1.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        layer = name.removesuffix(".weight")
        if weight.dim() != 2 or not changes(layer):
            continue
        num_out, num_in = weight.shape
        a = torch.randn(rank, num_in, generator=generator) / math.sqrt(num_in)
        b = torch.randn(num_out, rank, generator=generator) * size * math.sqrt(rank) / alpha
        tensors[f"base_model.model.{layer}.lora_A.weight"] = a
        tensors[f"base_model.model.{layer}.lora_B.weight"] = b
        merged[name] = (weight.double() + alpha / rank * b.double() @ a.double()).float()
    write_peft(directory, tensors, rank, alpha)
    return merged


def write_peft(
    directory: Path, tensors: dict[str, Tensor], rank: int, alpha: int, **more: Any
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in tensors}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "target_modules": sorted(layers),
        "bias": "none",
    } | more
    (directory / "adapter_config.json").write_text(json.dumps(config))
