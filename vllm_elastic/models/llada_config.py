# SPDX-License-Identifier: Apache-2.0
"""LLaDA's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from vllm_elastic.models.config_options import refuse_options

_ONLY = {
    "block_type": ("llama",),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}
"""Options that change what is computed, with what every released LLaDA has."""


class LLaDAConfig(PretrainedConfig):
    """Keys of LLaDA-8B's config.json, under the names that vLLM asks for as well.

    Raises:
        ValueError: an option that no released LLaDA uses and that this model does not compute.
    """

    model_type = "llada"
    qkv_bias = per_head_norm = False
    # A missing entry would not fail, it would read as 0 in vLLM.
    attribute_map = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    def __init__(
        self,
        d_model: int = 4096,
        n_heads: int = 32,
        n_kv_heads: int | None = None,
        n_layers: int = 32,
        mlp_hidden_size: int | None = 12288,
        max_sequence_length: int = 4096,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        mask_token_id: int = 126336,
        eos_token_id: int = 126081,
        pad_token_id: int | None = None,
        rope_theta: float = 500000.0,
        rms_norm_eps: float = 1e-5,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        for key in (*self.attribute_map, "num_experts"):
            if key in kwargs:
                raise ValueError(
                    f"LLaDA config: {key} is no key of LLaDA-8B's, whose sizes are called "
                    f"{', '.join(self.attribute_map.values())}. Other families that say "
                    'model_type "llada" are told by their "architectures".'
                )
        refuse_options("LLaDA", kwargs, _ONLY)
        self.d_model = d_model
        self.n_heads = n_heads
        self.n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.n_layers = n_layers
        if mlp_hidden_size is None:
            raise ValueError("LLaDA config: mlp_hidden_size must be given.")
        self.mlp_hidden_size = mlp_hidden_size
        self.max_sequence_length = max_sequence_length
        self.vocab_size = vocab_size
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        self.mask_token_id = mask_token_id
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.weight_tying = weight_tying
        kwargs["tie_word_embeddings"] = weight_tying
        super().__init__(eos_token_id=eos_token_id, pad_token_id=pad_token_id, **kwargs)
