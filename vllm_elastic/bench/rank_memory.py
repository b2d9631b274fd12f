# SPDX-License-Identifier: Apache-2.0
"""Where the memory of one rank goes: weights, a step, canvases.

Arithmetic on sizes: nothing is loaded and nothing is allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.models.rows import bucket
from vllm_elastic.models.shares import padded_rows
from vllm_elastic.runner.statistics.memory import reading_bytes, saved_bytes, totals_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class Setting:
    """What is asked of one rank.

    Attributes:
        shape: the whole model's sizes, and its bytes a number.
        weight_bits: of a weight of the layers' products, its share of scales included; None: as
            of any other number.
        ranks: that share the model; they divide it evenly.
        memory: bytes of a rank's device. utilization: share of it that vLLM may use.
        hidden_stride: the input of every n-th layer is kept.
        canvas: positions of a full canvas.
        row_budget: rows of a step. seats: requests at a time. window: positions that each
            predicts where it does not say otherwise. max_window: that any may predict.
        block_size: positions of a KV block.
        graph_rows: the most rows that a CUDA graph works on; 0: there are none.
        whole_rows: the same of graphs of whole passes.
    """

    shape: ModelShape
    ranks: int
    memory: int
    utilization: float
    hidden_stride: int
    canvas: int
    row_budget: int
    seats: int
    window: int
    max_window: int
    block_size: int
    graph_rows: int
    whole_rows: int = 0
    weight_bits: float | None = None

    @property
    def blocks_of_canvas(self) -> int:
        """KV blocks that a full canvas takes."""
        return -(-self.canvas // self.block_size)

    @property
    def limits(self) -> StepLimits:
        """The limits of a step."""
        return StepLimits.of(self.row_budget, self.seats, self.window, self.max_window, self.canvas)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, unless the name says otherwise.

    Attributes:
        step: what a step needs beside weights and cache, at its peak.
        graphs: what CUDA graphs hold, without CUDA's own part of them.
        left: for canvases; negative if all that is too much.
        keys_values_of_position, hidden_states_of_position: of one canvas position.
        positions: that fit, in whole KV blocks. canvases: full ones that fit.
    """

    ranks: int
    weights: int
    step: int
    graphs: int
    left: int
    keys_values_of_position: int
    hidden_states_of_position: int
    positions: int
    canvases: int

    @property
    def position(self) -> int:
        """Bytes of one canvas position."""
        return self.keys_values_of_position + self.hidden_states_of_position


def rank_memory(setting: Setting) -> RankMemory:
    """What one rank holds; all ranks hold the same."""
    shape, ranks = setting.shape, setting.ranks
    weights, step = weight_bytes(setting), step_bytes(setting)
    graphs = graph_bytes(setting)
    left = int(setting.memory * setting.utilization) - weights - step - graphs
    keys_values = shape.keys_values_bytes(ranks)
    hidden_states = shape.hidden_bytes(setting.hidden_stride, ranks)
    # vLLM keeps one KV block for itself.
    blocks = max(0, left // (setting.block_size * (keys_values + hidden_states)) - 1)
    return RankMemory(
        ranks=ranks,
        weights=weights,
        step=step,
        graphs=graphs,
        left=left,
        keys_values_of_position=keys_values,
        hidden_states_of_position=hidden_states,
        positions=blocks * setting.block_size,
        canvases=blocks // setting.blocks_of_canvas,
    )


def weight_bytes(setting: Setting) -> int:
    """Bytes of one rank's weights, split as vLLM's parallel layers split them.

    Queries, attention output, MLP and each expert are shared; a KV head is kept whole, by several
    ranks where there are fewer heads than ranks; rows of embedding and head are padded and shared;
    norms, and what chooses experts, are on every rank. What makes rows of images is counted whole
    on every rank, as it is with ``--mm-encoder-tp-mode data``. In a quantised checkpoint
    embedding, head, norms and what chooses experts are as ever.
    """
    shape, ranks = setting.shape, setting.ranks
    rows = padded_rows(shape.vocabulary) // ranks * (1 if shape.tied else 2)
    products = shape.layers * (shape.layer_parameters(ranks) - shape.whole_parameters)
    rest = shape.layers * shape.whole_parameters + (rows + 1) * shape.width
    bits = 8 * shape.bytes_per_number if setting.weight_bits is None else setting.weight_bits
    return shape.bytes_per_number * (rest + shape.image_parameters) + round(products * bits / 8)


def graph_bytes(setting: Setting) -> int:
    """Bytes that one rank's graphs hold; several ranks capture none unless the operator
    asks for them (``engine.optimisations``), which is not counted."""
    if setting.ranks > 1:
        return 0
    shape = setting.shape
    # A whole pass's graph keeps the queries of the layers whose attention the server's knobs read.
    read_layers = -(-shape.layers // ElasticConfig().attention_stride)
    of_passes = setting.whole_rows * read_layers * shape.width * shape.bytes_per_number
    return shape.graph_bytes(setting.graph_rows) + of_passes


def step_bytes(setting: Setting) -> int:
    """Bytes of a step on one rank: what the trial run at start holds at its peak."""
    shape, rows, saved_rows = setting.shape, setting.row_budget, setting.limits.saved_rows
    heads, kv_heads = shape.heads // setting.ranks, shape.kv_heads_of_rank(setting.ranks)
    lasting = saved_bytes(
        saved_rows, shape.layers, heads, shape.head_dim, shape.width, shape.bytes_per_number
    ) + totals_bytes(setting.seats, setting.canvas, shape.layers)
    asked = max(rows, setting.canvas)
    computed = bucket(asked)
    tested = bucket(asked + min(asked, saved_rows // 4)) - computed
    in_pass = max(
        shape.layer_bytes(computed, rows if asked > rows else computed, tested, setting.ranks),
        shape.logits_bytes(asked),
        reading_bytes(setting.canvas, heads, kv_heads, shape.head_dim),
    )
    return max(lasting + in_pass, shape.image_bytes)


def remedies(setting: Setting, shareable: Callable[[int], bool]) -> list[str]:
    """Changes, each of which alone makes a full canvas fit; the last, more memory, always does.

    Args:
        setting: one in which no full canvas fits.
        shareable: whether so many ranks share the model evenly.
    """

    def fits(**changes: Any) -> bool:
        return rank_memory(replace(setting, **changes)).canvases > 0

    shape, found = setting.shape, []
    more = range(setting.ranks + 1, shape.heads + 1)
    if ranks := next((n for n in more if shareable(n) and fits(ranks=n)), None):
        found.append(f"--tp {ranks}")
    strides = range(setting.hidden_stride + 1, shape.layers)
    if stride := next((s for s in strides if fits(hidden_stride=s)), None):
        found.append(f"--hidden-stride {stride}")
    if shape.bytes_per_number > 2 and fits(shape=replace(shape, bytes_per_number=2)):
        found.append("--dtype bfloat16")
    if setting.weight_bits is None and fits(weight_bits=8.0):
        found.append("--weight-bits 8")
    halves = [setting.seats >> n for n in range(1, setting.seats.bit_length())]
    if seats := next((n for n in halves if fits(seats=n)), None):
        found.append(f"--max-num-seqs {seats}")
    windows = [setting.max_window >> n for n in range(1, setting.max_window.bit_length())]
    if window := next((n for n in windows if n >= setting.window and fits(max_window=n)), None):
        found.append(f"--max-window {window}")
    parts = rank_memory(setting)
    if parts.positions:
        found.append(f"--canvas {parts.positions}")
    # Whole gibibytes: an estimate deserves no more digits.
    blocks = setting.blocks_of_canvas + 1
    needed = (
        parts.weights + parts.step + parts.graphs + blocks * setting.block_size * parts.position
    )
    return [*found, f"--memory {int(needed / setting.utilization / GIB) + 1}"]
