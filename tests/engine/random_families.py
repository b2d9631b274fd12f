# SPDX-License-Identifier: Apache-2.0
"""iLLaDA and LLaDA-MoE of random weights, by Transformers' modules and as checkpoints.

Llama's modules are iLLaDA. OLMoE's, with the norms of queries and keys made head by head, are
LLaDA-MoE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OlmoeConfig, OlmoeForCausalLM

from tests.transformers_oracle import TransformersOracle

from .conftest import EOS, MASK

# Odd on purpose: an MLP and a vocabulary that are multiples of nothing; 7 experts.
SIZES: dict[str, Any] = dict(
    vocab_size=293,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
    rope_theta=50_000.0,
)


class PerHead(nn.Module):
    """A norm of each head by itself, where OLMoE has one over all heads together."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        heads = x.unflatten(-1, (-1, len(self.norm.weight)))
        return self.norm(heads).flatten(-2)


def illada() -> tuple[Any, dict[str, Any]]:
    """iLLaDA's modules, and its config.json with the ids of the tests' small vocabulary."""
    keys = {**SIZES, "intermediate_size": 224, "tie_word_embeddings": True}
    raw = keys | {
        "architectures": ["ILLaDAForCausalLM"],
        "model_type": "nobody-knows",
        "layer_norm_eps": None,
        "mlp_bias": False,
    }
    return LlamaForCausalLM(LlamaConfig(**keys)), raw


def llada_moe() -> tuple[Any, dict[str, Any]]:
    """LLaDA-MoE's modules, likewise."""
    experts = {"num_experts": 7, "num_experts_per_tok": 3, "tie_word_embeddings": False}
    model = OlmoeForCausalLM(
        OlmoeConfig(**SIZES, **experts, intermediate_size=40, norm_topk_prob=False)
    )
    for block in model.model.layers:
        attention = block.self_attn
        for name in ("q_norm", "k_norm"):
            norm = type(block.input_layernorm)(attention.head_dim, eps=SIZES["rms_norm_eps"])
            setattr(attention, name, PerHead(norm))
    raw = {
        **SIZES,
        **experts,
        "architectures": ["LLaDAMoEModelLM"],
        "model_type": "llada",
        "expert_intermediate_size": 40,
        "qk_layernorm": True,
        "moe_layer_freq": [1] * SIZES["num_hidden_layers"],
    }
    return model, raw


FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "illada": illada,
    "llada-moe": llada_moe,
}


def save_family(name: str, directory: Path, seed: int = 3) -> TransformersOracle:
    """A family's random model, in ``directory`` under its checkpoints' tensor names."""
    model, raw = FAMILIES[name]()
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            drawn = 1 + 0.1 * drawn
        elif "embed_tokens" not in parameter_name or raw["tie_word_embeddings"]:
            drawn = drawn * (2 / math.sqrt(parameter.shape[-1]))
        parameter.data.copy_(drawn)
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(raw | ids))
    save_file(_under_checkpoint_names(model, raw), directory / "model.safetensors")
    return TransformersOracle(
        model, rope_theta=SIZES["rope_theta"], mask_token_id=MASK, eos_token_id=EOS
    )


def _under_checkpoint_names(model: nn.Module, raw: dict[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, weight in model.state_dict().items():
        name = name.replace("_norm.norm.", "_norm.")
        path, _, kind = name.rpartition(".")
        if kind == "gate_up_proj":
            for expert, both in enumerate(weight):
                gate, up = both.chunk(2)
                tensors[f"{path}.{expert}.gate_proj.weight"] = gate
                tensors[f"{path}.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, down in enumerate(weight):
                tensors[f"{path}.{expert}.down_proj.weight"] = down
        elif name != "lm_head.weight" or not raw["tie_word_embeddings"]:
            tensors[name] = weight
    return {name: weight.clone().contiguous() for name, weight in tensors.items()}
