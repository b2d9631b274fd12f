# SPDX-License-Identifier: Apache-2.0
"""Block-level invalidation: policy ``elastic-block``. Ours, not in any paper.

The canvas is cut into blocks of ``granularity`` positions. Of each block is kept: the step as of
which it is stored, the step in which it was last probed, and its *rate*, one number per layer.

With shifted logits the window's rows are those that predict it, each the one before its position;
all else is said of positions.

A step computes, from layer 0 on, the rows of its window, and what was just committed with all
positions within ``reach`` of it. The positions of stale blocks join at their block's layer.

A step *measures* if it computes everything or if it is the ``measure_every``-th since the last one
that did. It computes the *probes* from layer 0 on too. Then, in this order:

* A probe's drift at layer l is ``|new - old| / |old|`` of the hidden state at that layer's input,
  old being what was stored before the step; layer 0 has none. Its block's rate becomes that drift
  divided by ``age ** 0.6``, age being the steps since the probe's position was last computed.
* A block's attention is what the window's rows pay those of its positions that this step did not
  put in at layer 0 for its own sake (in a step that computes everything: that are not the
  window's rows), as a share of all, summed over heads and over the last layer and every
  ``attention_stride``-th before it.
* A block's expected drift ``measure_every`` steps from now is ``rate * age ** 0.6``, age being
  the steps since the block was refreshed. Its cost is its attention times that drift, largest
  layer. If all costs together exceed ``block_drift``, the costliest blocks are stale, as many as
  are needed to leave at most half of ``block_drift``. A stale block joins at the layer before the
  first one whose input's expected drift exceeds ``slack`` times the largest.
* The next probes: of the blocks with the largest product of attention and steps since they were
  probed, ``probes`` of them, the most attended position.

With ``rows_per_pass`` a step that would compute fewer positions has further blocks stale, where
they join as above: the costliest first by attention as last measured and expected drift in this
step, as long as the next one still fits and costs anything.

"next": stale blocks join the following pass. "replay": the step's predictions are discarded and
made again with the stale blocks refreshed; the rows of the step join where the first block does.

Once an end token is committed, what stands behind the leftmost one is neither a neighbour nor
probed, its attention is no block's, and stale blocks join without it; only a step in which every
block is stale from layer 0 on computes it.

Positions that the canvas has grown by are computed in the step that sees them first. They count as
computed in it, and blocks that begin with them as refreshed and probed in it, with a rate of 0.
Where every block is stale from layer 0 on, so are these.

With a ``hidden_stride`` s the inputs of layers s, 2 s, ... are stored: drift is known of these
only, and blocks join at one of them or at layer 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import margin
from .canvas import Canvas
from .decoding import DecodingOptions, commit_predictions
from .layer_cache import LayerCache
from .llada import LLaDA
from .result import DecodingResult

GROWTH = 0.6


@dataclass(frozen=True)
class ElasticBlockOptions(DecodingOptions):
    """``DecodingOptions`` and the policy's own; see above."""

    granularity: int = 32
    probes: int = 8
    measure_every: int = 4
    reach: int = 4
    block_drift: float = 0.05
    rows_per_pass: int = 0
    slack: float = 0.1
    attention_stride: int = 4
    refresh: Literal["next", "replay"] = "next"
    hidden_stride: int = 1


@dataclass
class Block:
    """What is known of one block; ``rate``: one number a layer."""

    positions: list[int]
    rate: list[float]
    refreshed_at: int = 0
    probed_at: int = 0
    attention: float = 0.0  # as last measured

    def drift(self, step: int) -> list[float]:
        """Expected at each layer's input, in a step."""
        return [rate * max(step - self.refreshed_at, 0) ** GROWTH for rate in self.rate]


@dataclass
class Measured:
    """A pass: (W, d) output of the window's rows, attention share of all, drift by probe."""

    hidden: Tensor
    share: list[float]
    drift: dict[int, list[float]]


class ElasticBlock:
    """One request being decoded; ``step`` runs one denoising step."""

    def __init__(self, model: LLaDA, canvas: Canvas, options: ElasticBlockOptions) -> None:
        self.model, self.canvas, self.options = model, canvas, options
        self.layers = model.config.n_layers
        self.cache = LayerCache(model, len(canvas))
        self.blocks: list[Block] = []
        self.computed_at: list[int] = []
        self.committed: list[int] = []
        self.probes: list[int] = []
        self.next_probes: list[int] = []
        self.measured_at = 0
        self.stale: dict[int, int] = {}  # block -> the layer at which it joins
        self.result = DecodingResult()
        self.appended: list[int] = []
        self.take_in_new()

    def take_in_new(self) -> None:
        """Positions that the canvas has and no block yet."""
        step, size = self.result.denoising_steps, self.options.granularity
        all_stale = self.all_stale
        self.appended = list(range(len(self.computed_at), len(self.canvas)))
        for position in self.appended:
            if position % size == 0:
                self.blocks.append(Block([], [0.0] * self.layers, step, step))
            self.blocks[-1].positions.append(position)
            self.computed_at.append(step)
        if all_stale:
            self.stale = dict.fromkeys(range(len(self.blocks)), 0)

    @property
    def all_stale(self) -> bool:
        """Every block is, from the embedding on."""
        return len(self.stale) == len(self.blocks) and not any(self.stale.values())

    def run(self, join: dict[int, int], predicting: Tensor) -> Measured:
        """All layers for positions that join at the layers given, (W,) of them the window's."""
        model, cache = self.model, self.cache
        probes = self.positions(self.probes)
        old = cache.hidden[:, probes].float()
        first = min(join.values())
        mass = torch.zeros(len(self.canvas), device=model.device)
        active, hidden = self.positions([]), cache.hidden[0, :0]
        for layer in range(first, self.layers):
            joining = self.positions(sorted(p for p, at in join.items() if at == layer))
            stored = model.embed(self.canvas.tokens) if layer == 0 else cache.hidden[layer]
            together = torch.cat([active, joining])
            order = together.argsort()
            active = together[order]
            hidden = torch.cat([hidden, stored[joining]])[order]
            q, k, v = model.project(layer, hidden, active)
            cache.write(layer, active, hidden, k, v)
            if (self.layers - 1 - layer) % self.options.attention_stride == 0:
                in_window = torch.isin(active, predicting)
                mass += model.attention_rows(q[:, in_window], cache.keys[layer]).sum(dim=(0, 1))
            attended = model.attend(q, cache.keys[layer], cache.values[layer])
            hidden = model.finish(layer, hidden, attended)
        new = cache.hidden[:, probes].float()
        change = (new - old).norm(dim=-1) / old.norm(dim=-1)
        for layer in range(self.layers):
            if layer == 0 or layer % self.options.hidden_stride:
                change[layer] = 0.0
        drift = {probe: change[:, i].tolist() for i, probe in enumerate(self.probes)}
        predicted_from = hidden[torch.isin(active, predicting)]
        return Measured(predicted_from, (mass / mass.sum()).tolist(), drift)

    def positions(self, these: list[int]) -> Tensor:
        """(n,) int64 where the model is."""
        return torch.tensor(these, dtype=torch.int64, device=self.model.device)

    def is_everything(self, join: dict[int, int]) -> bool:
        """Whether every position is computed from the embedding on."""
        return len(join) == len(self.canvas) and not any(join.values())

    def note_computed(self, join: dict[int, int]) -> None:
        """Positions, and in a pass over everything blocks too, are as of this step."""
        step = self.result.denoising_steps
        for position in join:
            self.computed_at[position] = step
        if self.is_everything(join):
            for block in self.blocks:
                block.refreshed_at = block.probed_at = step

    def judge(
        self, measured: Measured, join: dict[int, int], unwatched: list[int]
    ) -> dict[int, int]:
        """Learn from a pass; returns the stale blocks and where they join."""
        step, options = self.result.denoising_steps, self.options
        self.measured_at = step
        for probe, drift in measured.drift.items():
            block = self.blocks[probe // options.granularity]
            age = max(1, step - self.computed_at[probe])
            block.rate, block.probed_at = [d / age**GROWTH for d in drift], step
        self.note_computed(join)
        seen = set(range(self.canvas.to_be_shown)) - set(unwatched)
        watched = [[p for p in b.positions if p in seen] for b in self.blocks]
        attention = [sum(measured.share[p] for p in positions) for positions in watched]
        for block, paid in zip(self.blocks, attention, strict=True):
            block.attention = paid

        stale: dict[int, int] = {}
        ahead = step + options.measure_every
        cost = [a * max(b.drift(ahead)) for a, b in zip(attention, self.blocks, strict=True)]
        left = sum(cost)
        self.result.close_call(margin.of_threshold([left], options.block_drift))
        if left > options.block_drift:
            for index in sorted(range(len(cost)), key=lambda i: -cost[i]):
                if left <= options.block_drift / 2 or cost[index] == 0:
                    break
                left -= cost[index]
                stale[index] = self.joins_at(self.blocks[index].drift(ahead))
            self.result.close_call(
                margin.of_ranking(cost, len(stale)),
                margin.of_threshold([left], options.block_drift / 2),
            )
        for index in stale:
            self.blocks[index].refreshed_at = step + (options.refresh == "next")

        due = [a * (step + 1 - b.probed_at) for a, b in zip(attention, self.blocks, strict=True)]
        chosen = sorted(range(len(due)), key=lambda i: -due[i])[: options.probes]
        self.result.close_call(margin.of_ranking(due, options.probes))
        for index in chosen:
            attended = [measured.share[p] for p in watched[index]]
            self.result.close_call(margin.of_ranking(attended, 1))
        self.next_probes = sorted(
            max(watched[i], key=lambda p: measured.share[p])
            for i in chosen
            if due[i] > 0 and watched[i]
        )
        return stale

    def joins_at(self, drift: list[float]) -> int:
        """Where a block joins that has drifted so much at each layer's input."""
        slack = self.options.slack
        moved = [d > slack * max(drift) for d in drift]
        self.result.close_call(margin.of_threshold([d / max(drift) for d in drift], slack))
        at = max(0, moved.index(True) - 1) if any(moved) else self.layers - 1
        return at - at % self.options.hidden_stride

    def spend_spare_rows(self, rows: list[int]) -> None:
        """Blocks that are stale because a step of these ``rows`` and those stale has room."""
        step = self.result.denoising_steps
        shown = set(range(self.canvas.to_be_shown))
        taken = {p for index in self.stale for p in self.blocks[index].positions} | set(rows)
        cost = [block.attention * max(block.drift(step)) for block in self.blocks]
        spent = 0
        for index in sorted(range(len(cost)), key=lambda i: -cost[i]):
            block = self.blocks[index]
            together = (taken | set(block.positions)) & shown
            if cost[index] == 0 or len(together) > self.options.rows_per_pass:
                break
            taken, spent = together, spent + 1
            self.stale[index] = self.joins_at(block.drift(step))
            block.refreshed_at = step
        for count in (spent, spent + 1):
            self.result.close_call(margin.of_ranking(cost, count))

    def joins(self, rows: list[int], rows_at: int) -> dict[int, int]:
        """Where everything joins: stale blocks at their layers, ``rows`` at one of theirs."""
        bound = len(self.canvas) if self.all_stale else self.canvas.to_be_shown
        join = {
            p: at
            for index, at in self.stale.items()
            for p in self.blocks[index].positions
            if p < bound
        }
        return join | {p: min(rows_at, join.get(p, rows_at)) for p in rows}

    def near_commits(self) -> set[int]:
        """What was just committed and its neighbours, of those that may be shown."""
        reach = self.options.reach
        near = {p + by for p in self.committed for by in range(-reach, reach + 1)}
        return near & set(range(self.canvas.to_be_shown))

    def step(self) -> bool:
        """One denoising step; False, without one, if no position is open."""
        options = self.options
        window = self.canvas.window(options.window)
        if len(window) == 0:
            return False
        predicting = self.canvas.rows_predicting(window)
        measures = self.result.denoising_steps - self.measured_at >= options.measure_every
        shown = self.canvas.to_be_shown
        self.probes = [p for p in self.next_probes if p < shown] if measures else []
        rows = sorted({*predicting.tolist(), *self.near_commits(), *self.probes, *self.appended})
        if options.rows_per_pass:
            self.spend_spare_rows(rows)
        join = self.joins(rows, 0)
        kind = "refresh" if self.stale else "window"
        if self.all_stale:
            kind = "full" if self.result.denoising_steps else "first"
        own = rows
        if self.is_everything(join):
            self.probes, own, measures = [], predicting.tolist(), True
        passes = [(kind, join)]
        measured = self.run(join, predicting)
        self.stale = {}
        if measures:
            self.stale = self.judge(measured, join, own)
        else:
            self.note_computed(join)
        if self.stale and options.refresh == "replay":
            join = self.joins(rows, min(self.stale.values()))
            passes.append(("replay", join))
            self.probes = []
            measured = self.run(join, predicting)
            self.stale = {}
            for position in join:
                self.computed_at[position] = self.result.denoising_steps
        committed = commit_predictions(
            self.model, self.canvas, window, measured.hidden, options, self.result
        )
        self.committed = committed.tolist()
        self.result.record(
            [(kind, min(join.values()), len(join)) for kind, join in passes],
            self.committed,
            self.layers,
            len(self.canvas),
            row_layers=sum(self.layers - at for _, join in passes for at in join.values()),
        )
        self.canvas.grow()
        self.cache.grow(len(self.canvas))
        self.take_in_new()
        return True


def elastic_block(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: ElasticBlockOptions | None = None,
) -> DecodingResult:
    """Decode a request with block-level invalidation.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or ElasticBlockOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, *options.of_canvas)
    decoder = ElasticBlock(model, canvas, options)
    while decoder.step():
        pass
    return decoder.result.finish(canvas)
