# SPDX-License-Identifier: Apache-2.0
"""From which layer on each block of a canvas is stale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class BlockValidity:
    """Per block the first layer whose keys, values and input are stale; L means valid.

    Blocks are cut from the canvas, whatever positions a KV block of vLLM's has.

    A block that is stale from layer j holds usable hidden states at the *input* of layer j (j = 0:
    the embedding), so its rows can join a pass there.

    Args:
        hidden_stride: the inputs of every n-th layer are stored, so staleness begins there.

    Attributes:
        block_size: positions a block has.
        all_valid: nothing is stale, as before most passes.
        stale_from: int16 [blocks], 0 .. L.
    """

    def __init__(
        self, canvas_length: int, block_size: int, num_layers: int, hidden_stride: int = 1
    ) -> None:
        self.num_layers = num_layers
        self._hidden_stride = hidden_stride
        self.block_size = block_size
        self.stale_from: npt.NDArray[np.int16] = np.empty(0, dtype=np.int16)
        self.all_valid = False
        self.extend(canvas_length)

    @property
    def all_stale(self) -> bool:
        """Nothing of what is stored is of use: everything starts from the embedding."""
        return not self.stale_from.any()

    @property
    def first_stale_layer(self) -> int | None:
        """The layer in which the first stale row joins; None: nothing is stale."""
        return None if self.all_valid else int(self.stale_from.min())

    def extend(self, canvas_length: int) -> None:
        """The canvas has grown: blocks that are new to it are valid, unless nothing is.

        Whoever grows it sees to it that its new positions are computed.
        """
        self._canvas_length = canvas_length
        new = -(-canvas_length // self.block_size) - len(self.stale_from)
        layer = 0 if self.all_stale else self.num_layers
        self.stale_from = np.append(self.stale_from, np.full(new, layer, dtype=np.int16))

    def invalidate(self, stale_from: int | npt.NDArray[np.int16]) -> None:
        """Blocks become stale from a layer on: one for all, or one a block. Never less stale."""
        layers = np.asarray(stale_from, dtype=np.int16)
        if self._hidden_stride > 1:
            stored = layers - layers % self._hidden_stride
            layers = np.where(layers < self.num_layers, stored, layers)
        np.minimum(self.stale_from, layers, out=self.stale_from)
        self.all_valid = bool(self.stale_from.min() == self.num_layers)

    def validate(self) -> None:
        """All blocks were brought up to date by the pass that just ran."""
        self.stale_from[:] = self.num_layers
        self.all_valid = True

    def join_layers(self) -> npt.NDArray[np.int16]:
        """int16 [T]: the layer at which each position has to join to be valid again; L = not."""
        return self.stale_from.repeat(self.block_size)[: self._canvas_length]
