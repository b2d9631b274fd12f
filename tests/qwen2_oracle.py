# SPDX-License-Identifier: Apache-2.0
"""Dream's arithmetic by Transformers' own Qwen2 modules, cut where the oracle's decoders cut it.

The modules project, rotate, normalise and multiply; attention is the oracle's, over all keys.
``tests/reference/test_reference_dream.py`` holds the sum of these parts against
``Qwen2ForCausalLM`` under a mask that hides nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from vllm_elastic.reference import LLaDA, LLaDAConfig

DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "mask_token_id": 151666,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "pad_token_id": 151643,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
    # Remote code, which must not be asked for.
    "auto_map": {
        "AutoConfig": "configuration_dream.DreamConfig",
        "AutoModel": "modeling_dream.DreamModel",
    },
}
"""apple/DiffuCoder-7B-Instruct's config.json."""


def small_config(**sizes: Any) -> dict[str, Any]:
    """The same with the sizes of a test; odd ones on purpose."""
    small = {
        "bos_token_id": 290,
        "eos_token_id": 290,
        "hidden_size": 192,
        "intermediate_size": 224,
        "mask_token_id": 291,
        "max_position_embeddings": 256,
        "num_attention_heads": 6,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 290,
        "torch_dtype": "float32",
        "vocab_size": 293,
    }
    return DREAM | small | sizes


class Qwen2Oracle(LLaDA):
    """A Dream for the oracle's decoders, with seeded random weights.

    Args:
        raw: of a Dream's config.json.
        scale: deviation of what a linear layer makes of inputs of deviation 1; see
            ``LLaDA.random``. Biases are of that order too.
    """

    def __init__(self, raw: dict[str, Any], seed: int = 0, scale: float = 2.0) -> None:
        self.raw = raw
        kept = set(Qwen2Config().to_dict()) - {"architectures", "auto_map", "model_type"}
        values = {key: value for key, value in raw.items() if key in kept}
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
        self.qwen2 = Qwen2ForCausalLM(Qwen2Config(**values, attn_implementation="eager")).eval()
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.qwen2.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                drawn = 1 + 0.1 * drawn
            elif weight.dim() == 2 and (raw["tie_word_embeddings"] or "embed_tokens" not in name):
                drawn = drawn * (scale / math.sqrt(weight.shape[1]))
            weight.data.copy_(drawn)
            weight.requires_grad_(False)
        self.layers = self.qwen2.model.layers
        self.config = LLaDAConfig(
            d_model=raw["hidden_size"],
            n_heads=raw["num_attention_heads"],
            n_kv_heads=raw["num_key_value_heads"],
            n_layers=raw["num_hidden_layers"],
            mlp_hidden_size=raw["intermediate_size"],
            vocab_size=raw["vocab_size"],
            embedding_size=raw["vocab_size"],
            max_sequence_length=raw["max_position_embeddings"],
            rope_theta=raw["rope_theta"],
            rms_norm_eps=raw["rms_norm_eps"],
            weight_tying=raw["tie_word_embeddings"],
            mask_token_id=raw["mask_token_id"],
            eos_token_id=raw["eos_token_id"],
            logits_shift=1,
        )

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def save_pretrained(self, directory: str | Path) -> None:
        """As a Dream checkpoint: Qwen2's tensors by name, Dream's config.json."""
        self.qwen2.save_pretrained(directory)
        (Path(directory) / "config.json").write_text(json.dumps(self.raw))
        (Path(directory) / "generation_config.json").write_text(
            json.dumps({"eos_token_id": self.raw["eos_token_id"], "mask_token_id": None})
        )

    def embed(self, token_ids: Tensor) -> Tensor:
        return self.qwen2.model.embed_tokens(token_ids)

    def project(self, layer: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = self.layers[layer]
        x = block.input_layernorm(hidden)[None]
        q, k, v = (
            product(x).view(1, len(hidden), -1, self.config.head_dim).transpose(1, 2)
            for product in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.qwen2.model.rotary_emb(x, rows[None]))
        return q[0], k[0], v[0]

    def queries(self, layer: int, hidden: Tensor, rows: Tensor) -> Tensor:
        return self.project(layer, hidden, rows)[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        block = self.layers[layer]
        hidden = hidden + block.self_attn.o_proj(attended)
        return hidden + block.mlp(block.post_attention_layernorm(hidden))

    def head(self, hidden: Tensor) -> Tensor:
        return F.linear(self.qwen2.model.norm(hidden), self.qwen2.lm_head.weight)
