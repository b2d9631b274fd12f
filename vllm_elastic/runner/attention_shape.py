# SPDX-License-Identifier: Apache-2.0
"""What the attention statistics have to know of the model, and where its keys and inputs are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_elastic.attention.key_layout import KeyLayout


@dataclass(slots=True)
class AttentionShape:
    """The model's attention as the statistics see it.

    Attributes:
        num_heads, num_kv_heads: of this rank.
        key_cache: [L, blocks, Hkv, block_size, C], all layers' paged keys and values.
        hidden_rows: [stored, slots, d / ranks], this rank's columns of the stored inputs, of
            every ``hidden_stride``-th layer from that one on.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    key_layout: KeyLayout
    key_cache: torch.Tensor
    hidden_rows: torch.Tensor
    hidden_stride: int = 1

    def num_tested(self, tested_layers: int | None) -> int | None:
        """How many of the first so many layers store their input, or are layer 0; None: all."""
        return None if tested_layers is None else -(-tested_layers // self.hidden_stride)
