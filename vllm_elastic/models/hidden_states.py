# SPDX-License-Identifier: Apache-2.0
"""A layer's input hidden states, paged beside the keys and values.

With tensor parallelism each rank keeps its share of a position's columns, as it keeps its share of
the heads: no number is stored twice, and a rank's page holds as much of either as of the other. To
vLLM this is one more layer with a KV cache: same block table, same slots, memory accounted
for and freed by vLLM's KV cache manager.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionBackend
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec, KVCacheSpec

from vllm_elastic.models import ranks


class _StoreOnly(CacheOnlyAttentionBackend):
    """vLLM asks every layer with a cache whether its numbers depend on the batch."""

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class HiddenStateCache(nn.Module, AttentionLayerBase):
    """The residual stream at one layer's input, for every slot of the paged cache.

    Attributes:
        width: columns that this rank keeps, d / ranks.
        kv_cache: [blocks, 1, block_size, width], bound by vLLM once the cache is allocated.
    """

    def __init__(self, d_model: int, vllm_config: VllmConfig, layer_name: str) -> None:
        super().__init__()
        self.width = d_model // ranks.count()
        self.layer_name = layer_name
        self.num_heads = 1
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = torch.empty(0, device="cpu")
        context = vllm_config.compilation_config.static_forward_context
        if layer_name in context:
            raise ValueError(f"duplicate layer name: {layer_name}")
        context[layer_name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return _StoreOnly

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return HiddenStateCacheSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=self.width,
            dtype=self.dtype,
        )

    def read(self, slots: torch.Tensor) -> torch.Tensor:
        """Stored rows [R, d] at slots [R] (int64), gathered from all ranks."""
        return ranks.gather_columns(self.rows().index_select(0, slots))

    def write(self, rows: torch.Tensor, slots: torch.Tensor) -> None:
        """Store this rank's columns of rows [R, d] at slots [R] (int64), none of them twice."""
        self.rows()[slots] = ranks.own_columns(rows)

    def rows(self) -> torch.Tensor:
        """All slots [slots, width], a view."""
        return self.kv_cache.view(-1, self.width)
