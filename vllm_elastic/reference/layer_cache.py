# SPDX-License-Identifier: Apache-2.0
"""What is kept of every position at every layer between denoising steps."""

from __future__ import annotations

import torch
from torch import Tensor

from .llada import LLaDA


class LayerCache:
    """Keys, values and input hidden states of T positions at each layer.

    ``keys`` and ``values``: per layer (K, T, D). ``hidden``: per layer (T, d), the hidden state
    at that layer's *input*. Nothing in it is valid before the first step has written it.
    """

    def __init__(self, model: LLaDA, length: int) -> None:
        self.model = model
        config = model.config
        kv = (config.n_layers, config.n_kv_heads, length, config.head_dim)
        # NaN, so that reading what no step has written cannot go unseen.
        self.keys = torch.full(kv, torch.nan, dtype=model.dtype, device=model.device)
        self.values = torch.full_like(self.keys, torch.nan)
        self.hidden = self.keys.new_full((config.n_layers, length, config.d_model), torch.nan)

    def grow(self, length: int) -> None:
        """Make room for more positions."""
        new = length - self.keys.shape[2]
        room = (0, 0, 0, new)  # behind the last but one dimension
        self.keys = torch.nn.functional.pad(self.keys, room, value=torch.nan)
        self.values = torch.nn.functional.pad(self.values, room, value=torch.nan)
        self.hidden = torch.nn.functional.pad(self.hidden, room, value=torch.nan)

    def write(self, layer: int, rows: Tensor, hidden: Tensor, k: Tensor, v: Tensor) -> None:
        """Replace what is stored of positions ``rows`` (R,): hidden (R, d), k and v (K, R, D)."""
        self.hidden[layer].index_copy_(0, rows, hidden)
        self.keys[layer].index_copy_(1, rows, k)
        self.values[layer].index_copy_(1, rows, v)

    def run(self, token_ids: Tensor, rows: Tensor) -> Tensor:
        """All layers for positions ``rows`` (R,), over what is stored of the others.

        ``token_ids`` (T,) is the canvas. Returns (R, d), the output of the last layer.
        """
        model = self.model
        hidden = model.embed(token_ids[rows])
        for layer in range(model.config.n_layers):
            q, k, v = model.project(layer, hidden, rows)
            self.write(layer, rows, hidden, k, v)
            attended = model.attend(q, self.keys[layer], self.values[layer])
            hidden = model.finish(layer, hidden, attended)
        return hidden
