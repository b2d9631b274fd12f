# SPDX-License-Identifier: Apache-2.0
"""Dream's arithmetic by Transformers' own Qwen2 modules.

``tests/reference/test_reference_dream.py`` holds the sum of these parts against
``Qwen2ForCausalLM`` under a mask that hides nothing.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.transformers_oracle import TransformersOracle

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


class Qwen2Oracle(TransformersOracle):
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
        qwen2 = Qwen2ForCausalLM(Qwen2Config(**values, attn_implementation="eager"))
        generator = torch.Generator().manual_seed(seed)
        for name, weight in qwen2.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                drawn = 1 + 0.1 * drawn
            elif weight.dim() == 2 and (raw["tie_word_embeddings"] or "embed_tokens" not in name):
                drawn = drawn * (scale / math.sqrt(weight.shape[1]))
            weight.data.copy_(drawn)
        super().__init__(
            qwen2,
            rope_theta=raw["rope_theta"],
            mask_token_id=raw["mask_token_id"],
            eos_token_id=raw["eos_token_id"],
            logits_shift=1,
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """As a Dream checkpoint: Qwen2's tensors by name, Dream's config.json."""
        self.model.save_pretrained(directory)
        (Path(directory) / "config.json").write_text(json.dumps(self.raw))
        (Path(directory) / "generation_config.json").write_text(
            json.dumps({"eos_token_id": self.raw["eos_token_id"], "mask_token_id": None})
        )
