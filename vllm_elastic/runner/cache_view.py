# SPDX-License-Identifier: Apache-2.0
"""The paged keys and hidden states of all layers, and what reading them has to know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig

from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.models import ranks


def table_width(num_blocks: int) -> int:
    """Columns of a block table that has room for so many of the kernels' blocks.

    A multiple of 16: vLLM's Triton kernel is compiled once more for rows of other widths, when they
    come.
    """
    return -(-num_blocks // 16) * 16


@dataclass(slots=True)
class CacheView:
    """The model's caches as the runner and the statistics see them.

    Attributes:
        num_heads, num_kv_heads: of this rank.
        block_size: positions a block of vLLM's KV cache manager has.
        keys: [L, kernel blocks, Hkv, kernel block size, C], all layers' paged keys and values.
        hidden: [stored, slots, d / ranks], this rank's columns of the stored inputs, of every
            ``hidden_stride``-th layer from that one on.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    block_size: int
    key_layout: KeyLayout
    keys: torch.Tensor
    hidden: torch.Tensor
    hidden_stride: int

    @classmethod
    def of(cls, model: Any, kv_cache_config: KVCacheConfig) -> CacheView:
        """Args:
            model: a ``DiffusionTransformer`` whose caches are bound.

        Raises:
            RuntimeError: the layers' caches, or keys inside them, lie where we cannot read them.
        """
        layers = model.attention_layers
        first = layers[0]
        (group,) = kv_cache_config.kv_cache_groups
        block_size = group.kv_cache_spec.block_size
        num_blocks, kernel_block_size = first.kv_cache.shape[0], first.kv_cache.shape[2]
        if num_blocks * kernel_block_size != kv_cache_config.num_blocks * block_size:
            raise RuntimeError(
                f"--block-size {block_size}: {type(first.impl).__name__} splits a block into "
                f"blocks of {kernel_block_size} that are no neighbours; take {kernel_block_size}."
            )
        return cls(
            num_layers=len(layers),
            num_heads=first.num_heads,
            num_kv_heads=first.num_kv_heads,
            head_dim=first.head_size,
            scale=first.impl.scale,
            block_size=block_size,
            key_layout=KeyLayout.measure(first),
            keys=_stack_views([layer.kv_cache for layer in layers]),
            hidden=_hidden_states(model),
            hidden_stride=model.hidden_stride,
        )

    def kernel_blocks(self, block_ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """The attention kernels' blocks that make up blocks of the manager's, in order."""
        parts = self.block_size // self.key_layout.block_size
        if parts == 1:
            return block_ids
        return (block_ids[:, None] * parts + np.arange(parts, dtype=np.int32)).ravel()

    def table_width(self, num_positions: int) -> int:
        """Columns of a block table that has room for canvases of so many positions."""
        parts = self.block_size // self.key_layout.block_size
        return table_width(-(-num_positions // self.block_size) * parts)

    def num_stored_layers(self, below: int | None = None) -> int:
        """How many layers below this one (None: of all) store their input, layer 0 among them."""
        return -(-(self.num_layers if below is None else below) // self.hidden_stride)


def _hidden_states(model: Any) -> torch.Tensor:
    if model.hidden_states:
        return _stack_views([store.rows() for store in model.hidden_states])
    keys = model.attention_layers[0].kv_cache  # a model of one layer stores none
    return keys.new_empty(0, keys.shape[0] * keys.shape[2], model.width // ranks.count())


def _stack_views(views: list[torch.Tensor]) -> torch.Tensor:
    """Per-layer views as one [L, ...] view without a copy.

    vLLM lays the layers out at a constant stride in one allocation.

    Raises:
        RuntimeError: it does not.
    """
    first = views[0]
    offsets = [view.storage_offset() for view in views]
    stride = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    same_storage = {view.untyped_storage().data_ptr() for view in views}
    if len(same_storage) != 1 or offsets != [offsets[0] + i * stride for i in range(len(offsets))]:
        raise RuntimeError("the layers' KV caches are not at a constant stride in one allocation")
    return first.as_strided((len(views), *first.shape), (stride, *first.stride()), offsets[0])
