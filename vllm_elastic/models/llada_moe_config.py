# SPDX-License-Identifier: Apache-2.0
"""LLaDA-MoE's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

from typing import Any

from vllm_elastic.models.llama_config import LlamaKeysConfig


class LLaDAMoEConfig(LlamaKeysConfig):
    """LLaDA-MoE's config.json, whose ``model_type`` is LLaDA-8B's; it names no mask.

    ``norm_topk_prob`` is not read: the authors' code never scales the weights.
    """

    model_type = "llada_moe"
    family = "LLaDA-MoE"
    sizes = ("expert_intermediate_size", "num_experts", "num_experts_per_tok")
    attribute_map = {"intermediate_size": "expert_intermediate_size"}
    only = {
        "hidden_act": ("silu",),
        "qk_layernorm": (True,),
        "attention_bias": (False, None),
        "clip_qkv": (None,),
        "partial_rotary_factor": (1, None),
        "shared_expert_intermediate_size": (None, 0),
        "moe_router_enable_expert_bias": (False, None),
        "moe_router_score_function": ("softmax", None),
        "routed_scaling_factor": (1, None),
        "router_num_group": (None, 0, 1),
        "router_topk_group": (None, 0, 1),
    }
    own_mask_token_id = 156895
    own_eos_token_id = 156892
    per_head_norm = True

    def __init__(
        self,
        *,
        tie_word_embeddings: bool = False,
        moe_layer_freq: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        layers = moe_layer_freq if isinstance(moe_layer_freq, list) else [moe_layer_freq or 1]
        if not all(layer == 1 for layer in layers):
            raise ValueError(
                f"LLaDA-MoE config: moe_layer_freq={moe_layer_freq!r} has layers without experts, "
                "which is not supported, only 1 in all of them."
            )
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
