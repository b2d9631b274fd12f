# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model that decide what a pass costs and what a canvas takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from vllm_elastic.runner.statistics.memory import LOGITS_AT_ONCE

Numbers = TypeVar("Numbers", int, float, npt.NDArray[np.float64])


@dataclass(frozen=True)
class ModelShape:
    """A model's sizes; the defaults are LLaDA-8B's in bfloat16.

    Attributes:
        width: d_model. heads: of queries; kv_heads: of keys and values.
        mlp: of the MLP, or of an expert; vocabulary: rows of the embedding and of the head.
        bytes_per_number: of weights, keys, values and hidden states.
        image_parameters: of what makes rows of images. image_rows: that the largest image has
            before it is made smaller. 0: the model takes none.
        qkv_bias: queries, keys and values have one. head_norms: queries and keys are normed.
        experts: of a layer, in place of one MLP; 0: it has one. experts_per_row: that a row takes.
    """

    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    mlp: int = 12288
    vocabulary: int = 126464
    tied: bool = False
    bytes_per_number: int = 2
    image_parameters: int = 0
    image_rows: int = 0
    qkv_bias: bool = False
    head_norms: bool = False
    experts: int = 0
    experts_per_row: int = 0

    @classmethod
    def of(cls, config: Any, bytes_per_number: int = 2) -> ModelShape:
        """The sizes in a family's configuration, a transformers ``PretrainedConfig``."""
        images = {}
        if hasattr(config, "image_rules"):
            rules = config.image_rules()
            images = {
                "image_parameters": config.image_parameters,
                "image_rows": rules.most_tiles * rules.patches**2,
            }
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            mlp=config.intermediate_size,
            vocabulary=config.embedding_size,
            tied=config.tie_word_embeddings,
            bytes_per_number=bytes_per_number,
            qkv_bias=config.qkv_bias,
            head_norms=config.per_head_norm,
            experts=getattr(config, "num_experts", 0),
            experts_per_row=getattr(config, "num_experts_per_tok", 0),
            **images,
        )

    @property
    def head_dim(self) -> int:
        """Entries of a head."""
        return self.width // self.heads

    @property
    def key_width(self) -> int:
        """Entries of a position's keys in one layer, of all KV heads."""
        return self.kv_heads * self.head_dim

    def kv_heads_of_rank(self, ranks: int) -> int:
        """KV heads that one of so many ranks has: each is whole, on several where they are few."""
        return max(1, self.kv_heads // ranks)

    @property
    def projection_parameters(self) -> int:
        """The parameters of one layer's queries, keys and values."""
        return self.width * (self.width + 2 * self.key_width)

    @property
    def shared_rest_parameters(self) -> int:
        """The parameters of one layer's attention output and MLP, or all experts: what ranks
        share."""
        return self.width * (self.width + 3 * self.mlp * (self.experts or 1))

    @property
    def whole_parameters(self) -> int:
        """The parameters of one layer's norms and of what chooses experts: what every rank has."""
        return 2 * self.width + 2 * self.head_dim * self.head_norms + self.width * self.experts

    def layer_parameters(self, ranks: int) -> int:
        """The parameters of one layer on one of so many ranks."""
        made = self.width // ranks + 2 * self.kv_heads_of_rank(ranks) * self.head_dim
        own = self.width * made + made * self.qkv_bias
        return own + self.shared_rest_parameters // ranks + self.whole_parameters

    def parameters_read(self, rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The parameters that one layer's products read for so many rows, at least one; experts
        are taken evenly."""
        taken = np.ones_like(rows)
        if self.experts:
            taken = self.experts * (1 - (1 - self.experts_per_row / self.experts) ** rows)
        fixed = self.projection_parameters + self.width * (self.width + self.experts)
        return fixed + 3 * self.width * self.mlp * taken

    @property
    def head_parameters(self) -> int:
        return self.width * self.vocabulary

    def product_operations(self, projected: Numbers, finished: Numbers) -> Numbers:
        """Floating-point operations of the layers' matrix products.

        Args:
            projected: rows whose queries, keys and values are made, summed over layers.
            finished: rows that go on to the attention's output and the MLP, summed over layers.
        """
        rest = self.width * (self.width + 3 * self.mlp * (self.experts_per_row or 1) + self.experts)
        return 2 * (self.projection_parameters * projected + rest * finished)

    def attention_operations(self, attended: Numbers) -> Numbers:
        """Floating-point operations of scores and weighted values.

        Args:
            attended: rows times keys, summed over layers.
        """
        return 4 * self.width * attended

    def head_operations(self, window_rows: Numbers) -> Numbers:
        """Floating-point operations of the logits of so many rows."""
        return 2 * self.head_parameters * window_rows

    @property
    def image_bytes(self) -> int:
        """What the largest image needs while its rows are made: all of them, twice."""
        return 2 * self.bytes_per_number * self.image_rows * self.width

    def keys_values_bytes(self, ranks: int = 1) -> int:
        """What a rank keeps of a canvas position's keys and values (docs/design.md, Memory)."""
        entries = self.kv_heads_of_rank(ranks) * self.head_dim
        return self.bytes_per_number * self.layers * 2 * entries

    def hidden_bytes(self, stride: int, ranks: int = 1) -> int:
        """What a rank keeps of a canvas position's hidden states: its columns of the input of every
        ``stride``-th layer, and of layer 0's where images enter there."""
        stored = len(range(stride, self.layers, stride)) + bool(self.image_rows)
        return self.bytes_per_number * stored * (self.width // ranks)

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
        qkv = self.width // ranks + 2 * self.kv_heads_of_rank(ranks) * self.head_dim
        if whole:
            project = rows * self.width + projected * (2 * self.width + qkv)
            finish = rows * (self.width + self.width // ranks)
        else:
            in_chunk = last_chunk * self.width
            project = (rows + projected) * self.width + max(
                projected * qkv + in_chunk, projected * qkv * 2
            )
            finish = rows * (2 * self.width + self.width // ranks)
        finish += chunk * (2 * self.width + self._mlp_numbers(ranks))
        return self.bytes_per_number * max(project, finish)

    def graph_bytes(self, rows: int) -> int:
        """What the graphs of a layer's two parts hold of a lone rank, for up to so many rows.

        What all of them read and pass on (``runner.graphed_block.StaticRows``), and what the
        largest makes on its way: the others' intermediates lie in the same place.
        """
        project = 2 * self.width + 2 * self.key_width + 2 * self.width * self.head_norms
        finish = self.width + self._mlp_numbers(1)
        numbers = 2 * self.width + max(project, finish)
        return rows * (self.bytes_per_number * numbers + 8)  # 8: a position

    def _mlp_numbers(self, ranks: int) -> int:
        """Numbers that the MLP makes of a row; of experts as vLLM's fused kernel on GPUs has them.

        That keeps what an expert makes of a row at first in the memory of what it returns at last.
        """
        inner = self.mlp // ranks
        if not self.experts:
            return 3 * self.mlp // ranks
        return self.experts_per_row * (max(2 * inner, self.width) + inner)

    def logits_bytes(self, window_rows: int) -> int:
        """What the candidates of so many rows need on each rank, at its peak.

        Their logits, ``LOGITS_AT_ONCE``, which every rank has in full: themselves, a copy where
        log probabilities are asked for, and what is made of them in float64. And the rows' final
        hidden states.
        """
        at_once = min(window_rows, max(1, LOGITS_AT_ONCE // self.vocabulary))
        logits = self.vocabulary * at_once * (2 * self.bytes_per_number + 8)
        return window_rows * self.width * self.bytes_per_number + logits
