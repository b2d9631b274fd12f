# SPDX-License-Identifier: Apache-2.0
"""Dream's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

from typing import Any

from vllm_elastic.models.llama_config import LlamaKeysConfig


class DreamConfig(LlamaKeysConfig):
    """Keys of Dream's config.json, which are Qwen2's and a mask.

    The mask's id is this file's or Dream's own; a generation_config.json, which has a null there,
    is never asked.

    Attributes:
        logits_shift: the candidates of position p are read from row p - 1.
        end_of_turn, stop_tokens: what ends an answer beside the end of text, by name; the last one
            is DiffuCoder's padding.

    Raises:
        ValueError: also where some layers are to have a sliding window.
    """

    model_type = "Dream"
    family = "Dream"
    sizes = ("intermediate_size",)
    only = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),
        "use_mrope": (False, None),
        "mlp_bias": (False, None),
        "attention_bias": (True, None),
        "partial_rotary_factor": (1, None),
        "is_causal": (False, None),
    }
    own_mask_token_id = 151666
    own_eos_token_id = 151643
    logits_shift = 1
    qkv_bias = True
    end_of_turn = "<|im_end|>"
    stop_tokens = (end_of_turn, "<|dlm_pad|>")

    def __init__(self, *, tie_word_embeddings: bool = False, **kwargs: Any) -> None:
        kinds = set(kwargs.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise ValueError(f"Dream config: layer_types has {min(kinds)!r}, not supported.")
        kwargs["sliding_window"] = None  # not used: vLLM would take the number for a limit
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
