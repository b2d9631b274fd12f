# SPDX-License-Identifier: Apache-2.0
"""Models of Transformers as oracles: its modules compute, ``vllm_elastic.reference`` decodes.

The modules embed, project, rotate, normalise and multiply. Attention alone is the reference's: over
a canvas nothing is masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.reference.llada import EMBEDDING


class TransformersOracle(LLaDA):
    """One of Transformers' causal models, cut where the reference's decoders cut LLaDA's forward.

    Args:
        model: with Llama's modules under Llama's names; norms of queries and keys if it has any.
        decoding: further fields of the ``LLaDAConfig``: ids, and ``logits_shift``.
    """

    def __init__(self, model: Any, *, rope_theta: float, **decoding: int) -> None:
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
            rope_theta=rope_theta,
            rms_norm_eps=own.rms_norm_eps,
            weight_tying=own.tie_word_embeddings,
            **decoding,
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
