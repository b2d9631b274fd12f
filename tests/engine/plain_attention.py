# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged cache by torch's operators, for graphs that have attention in them.

vLLM's CPU backend lays each batch out on the host (``scheduler_metadata``), so a tape of its
kernel would attend to the canvas of the recording. Here all that differs between two passes is read
from tensors, as GPU backends do. Keys lie where the backend's would, so statistics find them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from vllm_elastic.attention.key_layout import KeyLayout


class PlainAttention:
    """Two of a backend's methods, for one layer.

    Args:
        width: columns that every block table is filled up to.
    """

    def __init__(self, attn: Any, layout: KeyLayout, width: int) -> None:
        self._scale, self._size, self._width = attn.impl.scale, layout.block_size, width
        self._heads = torch.arange(attn.num_kv_heads)[None, :, None]
        self._keys = layout.offsets.t().contiguous()  # [slot, D], in a plane
        plane = torch.ones(layout.block_size * layout.row_width, dtype=torch.bool)
        plane[self._keys] = False
        self._values = plane.nonzero().view(layout.block_size, -1)

    def do_kv_cache_update(
        self, attn: Any, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        planes = cache.view(*cache.shape[:2], -1)
        blocks, within = (slots // self._size)[:, None, None], slots % self._size
        planes[blocks, self._heads, self._keys[within][:, None]] = k
        planes[blocks, self._heads, self._values[within][:, None]] = v

    def forward(
        self,
        attn: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        starts, lengths, table = metadata.query_start_loc, metadata.seq_lens, metadata.block_table
        rows = torch.arange(len(q), dtype=starts.dtype)
        owners = torch.searchsorted(starts[1:], rows, right=True).clamp_max(len(lengths) - 1)
        table = F.pad(table, (0, self._width - table.shape[1]))
        planes = cache.view(*cache.shape[:2], -1)[table.long()]  # [S, width, Hkv, plane]
        keys, values = (planes[..., each].transpose(1, 2) for each in (self._keys, self._values))
        # [S, Hkv, positions, D], of each row.
        keys, values = (each.flatten(2, 3)[owners] for each in (keys, values))
        grouped = q.view(len(q), keys.shape[1], -1, q.shape[-1])
        scores = grouped @ keys.transpose(-1, -2) * self._scale
        seen = torch.arange(keys.shape[2]) < lengths[owners][:, None]
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        # What lies behind a canvas is another one's, or was never written.
        values = torch.where(seen[:, None, :, None], values, 0)
        attended = (scores.softmax(-1) @ values).view_as(output)
        output.copy_(torch.where((rows < starts[-1])[:, None, None], attended, output))


@contextlib.contextmanager
def plain_attention(runner: Any) -> Iterator[None]:
    """The engine's layers attend this way for a while."""
    width = runner.cache.table_width(runner.model_config.max_model_len)
    layers = runner.model.attention_layers
    for attn in layers:
        plain = PlainAttention(attn, runner.cache.key_layout, width)
        attn.impl.forward, attn.impl.do_kv_cache_update = plain.forward, plain.do_kv_cache_update
    try:
        yield
    finally:
        for attn in layers:
            del attn.impl.forward, attn.impl.do_kv_cache_update
