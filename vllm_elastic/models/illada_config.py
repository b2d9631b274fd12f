# SPDX-License-Identifier: Apache-2.0
"""iLLaDA's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

from typing import Any

from vllm_elastic.models.llama_config import LlamaKeysConfig


class ILLaDAConfig(LlamaKeysConfig):
    """iLLaDA's config.json. It names no mask; the ids are those of its tokenizer.

    ``layer_norm_eps`` is null; a number in its place would stand for a LayerNorm.
    """

    model_type = "illada"
    family = "iLLaDA"
    sizes = ("intermediate_size",)
    only = {
        "hidden_act": ("silu",),
        "layer_norm_eps": (None,),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "partial_rotary_factor": (1, None),
        "sliding_window": (None,),
    }
    own_mask_token_id = 5
    own_eos_token_id = 2
    grow_by = 32  # as its authors decode

    def __init__(self, *, tie_word_embeddings: bool = True, **kwargs: Any) -> None:
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
