# SPDX-License-Identifier: Apache-2.0
"""Llama without a causal mask: pre-RMSNorm, rotate-half RoPE, SwiGLU; what most families are.

A family adds its configuration, and where it differs its MLP and tensor names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from vllm_elastic.models.layers import AttentionProjection, GatedMLP, KernelRMSNorm, PreNormBlock
from vllm_elastic.models.llada_config import LLaDAConfig
from vllm_elastic.models.llama_config import LlamaKeysConfig
from vllm_elastic.models.transformer import DiffusionTransformer


def in_blocks(names: dict[str, str]) -> dict[re.Pattern[str], str | None]:
    """For a ``WeightsMapper``: patterns of what a checkpoint calls the parts of a block.

    They also match where a name starts at the block, as in the lists of quantised checkpoints.

    Args:
        names: patterns -> our names.
    """
    return {re.compile(rf"^(blocks\.\d+\.)?{old}\b"): rf"\1{new}" for old, new in names.items()}


class LlamaLike(DiffusionTransformer):
    """Weight names are those of a Llama checkpoint (``model.layers.0.self_attn.q_proj``), unless a
    family has its own.
    """

    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\."): "",
            re.compile(r"^layers\."): "blocks.",
            **in_blocks(
                {
                    "self_attn": "attention",
                    "input_layernorm": "attention_norm",
                    "post_attention_layernorm": "mlp_norm",
                }
            ),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: LlamaKeysConfig | LLaDAConfig = vllm_config.model_config.hf_config
        width = config.hidden_size

        def norm() -> KernelRMSNorm:
            return KernelRMSNorm(width, eps=config.rms_norm_eps)

        def make_block(name: str) -> PreNormBlock:
            attention = AttentionProjection(
                vllm_config,
                f"{name}.attention",
                width=width,
                num_heads=config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
                head_dim=width // config.num_attention_heads,
                max_position=config.max_position_embeddings,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                qkv_bias=config.qkv_bias,
                head_norm_eps=config.rms_norm_eps if config.per_head_norm else None,
            )
            mlp = self.make_mlp(vllm_config, f"{name}.mlp", config)
            return PreNormBlock(norm(), attention, norm(), mlp)

        super().__init__(
            vllm_config,
            prefix,
            width=width,
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            rows_of_embedding=config.embedding_size,
            tied=config.tie_word_embeddings,
            norm=norm(),
            make_block=make_block,
        )

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str, config: LlamaKeysConfig) -> nn.Module:
        """A block's MLP: rows [R, d] to what they gain."""
        return GatedMLP(
            vllm_config, prefix, width=config.hidden_size, inner=config.intermediate_size
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's own tensor names; returns the parameters that were filled.

        Raises:
            ValueError: a tensor that the model does not have.
        """
        return self.load_named(weights)
