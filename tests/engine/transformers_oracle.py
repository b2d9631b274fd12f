# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers as oracles: its modules compute, ``vllm_elastic.reference`` decodes.

Llama's modules are iLLaDA. OLMoE's, with the norms of queries and keys made head by head, are
LLaDA-MoE. Attention alone is the reference's: over a canvas nothing is masked.
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
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.reference.llada import EMBEDDING

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


class TransformersOracle(LLaDA):
    """One of Transformers' models, cut where the reference's decoders cut LLaDA's forward."""

    def __init__(self, model: Any) -> None:
        own = model.config
        self.model = model.eval().requires_grad_(False)
        self.weights = {EMBEDDING: model.model.embed_tokens.weight}
        self.config = LLaDAConfig(
            d_model=own.hidden_size,
            n_heads=own.num_attention_heads,
            n_kv_heads=own.num_key_value_heads,
            n_layers=own.num_hidden_layers,
            mlp_hidden_size=own.intermediate_size,
            vocab_size=own.vocab_size,
            embedding_size=own.vocab_size,
            max_sequence_length=own.max_position_embeddings,
            rope_theta=SIZES["rope_theta"],
            rms_norm_eps=own.rms_norm_eps,
            weight_tying=own.tie_word_embeddings,
            mask_token_id=MASK,
            eos_token_id=EOS,
        )

    def project(self, layer: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.model.model.layers[layer]
        attention, x = block.self_attn, block.input_layernorm(hidden)
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k, v = (
            part.unflatten(-1, (-1, self.config.head_dim)).transpose(0, 1) for part in (q, k, v)
        )
        cos, sin = self.model.model.rotary_emb(x, rows[None])
        q, k = apply_rotary_pos_emb(q[None], k[None], cos, sin)
        return q[0], k[0], v

    def queries(self, layer: int, hidden: Tensor, rows: Tensor) -> Tensor:
        return self.project(layer, hidden, rows)[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.model.model.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attended)
        return hidden + block.mlp(block.post_attention_layernorm(hidden)[None])[0]

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def whole(self, token_ids: Tensor) -> Tensor:
        """Transformers' own forward, nothing masked: (T,) token ids -> (T, vocabulary) logits."""
        length = len(token_ids)
        nothing = torch.zeros(1, 1, length, length)
        return self.model(token_ids[None], attention_mask=nothing, use_cache=False).logits[0]


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
    return TransformersOracle(model)


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
