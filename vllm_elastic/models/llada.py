# SPDX-License-Identifier: Apache-2.0
"""LLaDA (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5).

A Llama-like transformer without a causal mask: pre-RMSNorm, rotate-half RoPE, SwiGLU, no biases.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from vllm.config import VllmConfig

from vllm_elastic.models.layers import AttentionProjection, GatedMLP, KernelRMSNorm, PreNormBlock
from vllm_elastic.models.llada_config import LLaDAConfig
from vllm_elastic.models.transformer import DiffusionTransformer

STACKED: dict[str, tuple[str, str | int]] = {
    "q_proj": ("attention.qkv_proj", "q"),
    "k_proj": ("attention.qkv_proj", "k"),
    "v_proj": ("attention.qkv_proj", "v"),
    "ff_proj": ("mlp.gate_up_proj", 0),
    "up_proj": ("mlp.gate_up_proj", 1),
}

IN_BLOCKS = {
    "attn_norm": "attention_norm",
    "attn_out": "attention.o_proj",
    "ff_norm": "mlp_norm",
    "ff_out": "mlp.down_proj",
}
OUTSIDE = {"wte": "embed_tokens", "ln_f": "norm", "ff_out": "lm_head"}


class LLaDAModelLM(DiffusionTransformer):
    """Weight names are those of the released checkpoints (``model.transformer.*``)."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config: LLaDAConfig = vllm_config.model_config.hf_config

        def norm() -> KernelRMSNorm:
            return KernelRMSNorm(config.d_model, eps=config.rms_norm_eps)

        def make_block(name: str) -> PreNormBlock:
            attention = AttentionProjection(
                vllm_config,
                f"{name}.attention",
                width=config.d_model,
                num_heads=config.n_heads,
                num_kv_heads=config.n_kv_heads,
                head_dim=config.d_model // config.n_heads,
                max_position=config.max_sequence_length,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            )
            mlp = GatedMLP(
                vllm_config, f"{name}.mlp", width=config.d_model, inner=config.mlp_hidden_size
            )
            return PreNormBlock(norm(), attention, norm(), mlp)

        super().__init__(
            vllm_config,
            prefix,
            width=config.d_model,
            num_layers=config.n_layers,
            vocab_size=config.vocab_size,
            rows_of_embedding=config.embedding_size,
            tied=config.weight_tying,
            norm=norm(),
            make_block=make_block,
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load LLaDA's own tensor names; returns the parameters that were filled.

        Raises:
            ValueError: a tensor that LLaDA does not have.
        """
        return self.load_named(weights, self._name_of, STACKED)

    def _name_of(self, name: str) -> str | None:
        name = name.removeprefix("model.").removeprefix("transformer.")
        if name.startswith("blocks."):
            _, index, module, suffix = name.split(".", 3)
            return f"blocks.{index}.{IN_BLOCKS.get(module, module)}.{suffix}"
        module, _, suffix = name.partition(".")
        if module == "ff_out" and self.tied:
            return None
        return f"{OUTSIDE.get(module, module)}.{suffix}"
