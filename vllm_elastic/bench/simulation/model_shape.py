# SPDX-License-Identifier: Apache-2.0
"""The sizes of a LLaDA that decide what a pass costs and what a canvas takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

LOGITS_AT_ONCE = 1 << 25
"""Logits that exist at a time, and numbers of 8 bytes made of them (``runner/head.py``,
``runner/candidates.py``)."""

Numbers = TypeVar("Numbers", int, float, npt.NDArray[np.float64])


@dataclass(frozen=True)
class ModelShape:
    """A LLaDA's sizes; the defaults are LLaDA-8B's in bfloat16.

    Attributes:
        width: d_model; key_width: n_kv_heads times the entries of a head.
        mlp: mlp_hidden_size; vocabulary: rows of the embedding and of the head.
        bytes_per_number: of weights, keys, values and hidden states.
        image_parameters: of what makes rows of images. image_rows: that the largest image has
            before it is made smaller. 0: the model takes none.
    """

    width: int = 4096
    key_width: int = 4096
    layers: int = 32
    heads: int = 32
    mlp: int = 12288
    vocabulary: int = 126464
    tied: bool = False
    bytes_per_number: int = 2
    image_parameters: int = 0
    image_rows: int = 0

    @property
    def stored_inputs(self) -> int:
        """Layers whose input is kept: all but layer 0, and that too where images enter there."""
        return self.layers - 1 + bool(self.image_rows)

    @classmethod
    def from_config(cls, path: Path, bytes_per_number: int = 2) -> ModelShape:
        """From a checkpoint's config.json.

        Raises:
            SystemExit: the file is no LLaDA's; names what is missing.
        """
        config = json.loads(path.read_text())
        wanted = {"d_model", "n_layers", "n_heads", "mlp_hidden_size", "vocab_size"}
        if missing := sorted(wanted - set(config)):
            raise SystemExit(f"{path}: not a LLaDA's config, lacks {', '.join(missing)}")
        kv_heads = config.get("n_kv_heads") or config["n_heads"]
        return cls(
            width=config["d_model"],
            key_width=config["d_model"] // config["n_heads"] * kv_heads,
            layers=config["n_layers"],
            heads=config["n_heads"],
            mlp=config["mlp_hidden_size"],
            vocabulary=config.get("embedding_size") or config["vocab_size"],
            tied=config.get("weight_tying", False),
            bytes_per_number=bytes_per_number,
        )

    @property
    def projection_parameters(self) -> int:
        """Of one layer's queries, keys and values."""
        return self.width * (self.width + 2 * self.key_width)

    @property
    def rest_parameters(self) -> int:
        """Of one layer's attention output and MLP."""
        return self.width * (self.width + 3 * self.mlp)

    @property
    def head_parameters(self) -> int:
        return self.width * self.vocabulary

    def product_operations(self, projected: Numbers, finished: Numbers) -> Numbers:
        """Floating-point operations of the layers' matrix products.

        Args:
            projected: rows whose queries, keys and values are made, summed over layers.
            finished: rows that go on to the attention's output and the MLP, summed over layers.
        """
        return 2 * (self.projection_parameters * projected + self.rest_parameters * finished)

    def attention_operations(self, attended: Numbers) -> Numbers:
        """Of scores and weighted values; ``attended``: rows times keys, summed over layers."""
        return 4 * self.width * attended

    def head_operations(self, window_rows: Numbers) -> Numbers:
        """Of the logits of so many rows."""
        return 2 * self.head_parameters * window_rows

    @property
    def weight_bytes(self) -> int:
        """All weights; norms included."""
        layer = self.projection_parameters + self.rest_parameters + 2 * self.width
        ends = self.head_parameters * (1 if self.tied else 2) + self.width
        return self.bytes_per_number * (self.layers * layer + ends + self.image_parameters)

    @property
    def image_bytes(self) -> int:
        """What the largest image needs while its rows are made: all of them, twice."""
        return 2 * self.bytes_per_number * self.image_rows * self.width

    @property
    def position_bytes(self) -> int:
        """Keys, values and hidden states of one canvas position (docs/design.md, Memory)."""
        keys_values = self.layers * 2 * self.key_width
        return self.bytes_per_number * (keys_values + self.stored_inputs * self.width)

    def layer_bytes(self, rows: int, chunk_rows: int, tested_rows: int = 0, ranks: int = 1) -> int:
        """What a layer needs of a rank beside weights and cache, at its peak.

        The larger of the two parts of a layer (``DiffusionTransformer.run_without_cache``):
        queries, keys and values, which all rows' exist at once, in two copies where they are
        worked out in chunks; and what follows the attention, whose MLP has a chunk's rows.

        Args:
            rows: that are computed; tested_rows: of these, projected once more.
            chunk_rows: rows that are worked on at a time.
        """
        projected, whole = rows + tested_rows, rows <= chunk_rows
        chunk, last_chunk = min(rows, chunk_rows), chunk_rows + tested_rows
        qkv = self.width // ranks + 2 * self.key_width
        if whole:
            project = rows * self.width + projected * (2 * self.width + qkv)
            finish = rows * (self.width + self.width // ranks)
        else:
            in_chunk = last_chunk * self.width
            project = (rows + projected) * self.width + max(
                projected * qkv + in_chunk, projected * qkv * 2
            )
            finish = rows * (2 * self.width + self.width // ranks)
        finish += chunk * (2 * self.width + 3 * self.mlp // ranks)
        return self.bytes_per_number * max(project, finish)

    def logits_bytes(self, window_rows: int) -> int:
        """What the candidates of so many rows need on each rank, at its peak.

        Their logits, ``LOGITS_AT_ONCE``, which every rank has in full: themselves, a copy where
        log probabilities are asked for, and what is made of them in float64. And the rows' final
        hidden states.
        """
        at_once = min(window_rows, max(1, LOGITS_AT_ONCE // self.vocabulary))
        logits = self.vocabulary * at_once * (2 * self.bytes_per_number + 8)
        return window_rows * self.width * self.bytes_per_number + logits
