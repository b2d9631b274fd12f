# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of the tiny LLaDA's layers, and PEFT's folder of files for them.

LoRA (Hu et al., arXiv 2106.09685): a frozen matrix W [out, in] is used as W + alpha / r * B A, with
A [r, in] and B [out, r] trained. Knows nothing about tasks or training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from model import TinyLLaDA
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

RANK = 8
ALPHA = 16
MODULES = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
PREFIX = "base_model.model."  # what PEFT puts before the adapted model's own names
HEAD = "model.transformer.ff_out"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class LoRALinear(nn.Module):
    """A frozen linear layer and what its adapter adds.

    A and B are kept in float32, where small updates are not lost, and used in the layer's dtype.
    """

    def __init__(self, base: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = base.weight.requires_grad_(False)
        bound = base.in_features**-0.5  # as PEFT does
        a = torch.empty(RANK, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(a)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        down = F.linear(x, self.lora_A.to(x.dtype))
        added = F.linear(down, (ALPHA / RANK * self.lora_B).to(x.dtype))
        return F.linear(x, self.weight) + added


def attach(model: TinyLLaDA, seed: int) -> dict[str, LoRALinear]:
    """Freeze the model and put an adapter that adds nothing yet on its layers.

    Returns every adapted layer by its name in the checkpoint.
    """
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    adapted = {}
    for index, block in enumerate(model.model["transformer"]["blocks"]):
        for module in MODULES:
            layer = LoRALinear(getattr(block, module), generator)
            setattr(block, module, layer)
            adapted[f"model.transformer.blocks.{index}.{module}"] = layer
    return adapted


def save(folder: Path, adapted: dict[str, LoRALinear], base: str) -> None:
    """Write a PEFT folder: A [r, in] and B [out, r] of every layer in bfloat16, and the config."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config_dict(base), indent=2) + "\n")
    tensors = {
        f"{PREFIX}{name}.{part}.weight": getattr(layer, part).detach().bfloat16()
        for name, layer in adapted.items()
        for part in ("lora_A", "lora_B")
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)


def config_dict(base: str) -> dict[str, object]:
    """`adapter_config.json` of an adapter for the model named `base`."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "target_modules": list(MODULES),
        # PEFT takes a listed name wherever it stands, and the head is called `ff_out`, too.
        "exclude_modules": [HEAD],
        "inference_mode": True,
    }


@torch.no_grad()
def merge(weights: Mapping[str, Tensor], folder: Path) -> None:
    """Add a folder's adapter to a model's weights by their names, in place, computed in float32."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    for name in sorted(tensors):
        layer, part, _ = name.removeprefix(PREFIX).rsplit(".", 2)
        if part == "lora_A":
            a, b = (tensors[f"{PREFIX}{layer}.{of}.weight"].float() for of in ("lora_A", "lora_B"))
            weight = weights[f"{layer}.weight"]
            weight.copy_(weight.float() + config["lora_alpha"] / config["r"] * (b @ a))
