# SPDX-License-Identifier: Apache-2.0
"""Elastic-Cache (arXiv 2510.14973, with what its released code does): policy ``elastic``.

What is pinned down here beyond the paper:

* Inside a layer of a window pass, in this order: queries, keys and values of the rows; the
  tracked positions' attention *before*, with the query projected from the hidden state stored
  at this layer and the keys stored at this layer, both as the previous step left them; the
  rows' new keys, values and hidden states are stored; the rows' attention *after*; the test.
* ``similarity < gamma`` triggers: gamma 0 never does, 1.01 always does (in the first layer).
  Without tracked positions nothing is tested.
* A step that refreshes goes on from the next layer with all T positions and tests no more
  layers. It is recorded as an engine runs it that cannot branch inside a forward: a window pass
  through all layers, thrown away, and a replay from layer l*+1. The replay recomputes every
  position in the layers that the window pass should not have written, so the two are the same.
* The window's rows are those that predict it: its own, or with shifted logits those before.
* Tracking looks at the attention of the window's rows: layers up to l* have it from this step's
  rows over the reused cache, layers beyond from the refresh. The first step tracks, too.
* Positions that the canvas has grown by are computed in the step that sees them first; that step
  tests nothing, for the step before had no keys of theirs.
* A position counts as masked as long as its token is the mask, dropped ones included; a step's
  own commits come after its tracking. Equal attention mass goes to the smaller position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import margin
from .canvas import Canvas, index_in, union
from .decoding import DecodingOptions, commit_predictions
from .drift import Statistic, similarity
from .layer_cache import LayerCache
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class ElasticOptions(DecodingOptions):
    """``DecodingOptions`` and Elastic-Cache's own.

    Attributes:
        gamma: similarity below which the layers beyond are recomputed.
        track_num: positions tracked per layer.
        statistic: see ``drift.similarity``.
        refresh: "replay" is the paper. "next" is ours: the step that finds the drift is finished
            as it is, and in the following step everyone joins at l*+1; the layers below that are
            tested as ever.
        reach: ours; 0 is the paper. Positions on either side of a just committed one that are
            computed with it.
        hidden_stride: s, ours: hidden states are stored at the inputs of layers s, 2 s, ... Only
            these layers and layer 0 are tested, and everyone joins at the nearest of them that
            is not above l*+1; layers from there to l* are computed once more, by everyone.
    """

    gamma: float = 0.9
    track_num: int = 1
    statistic: Statistic = "released"
    refresh: Literal["replay", "next"] = "replay"
    reach: int = 0
    hidden_stride: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.track_num < 1:
            raise ValueError(f"track_num is {self.track_num}, must be at least 1")
        if self.statistic not in ("released", "paper"):
            raise ValueError(f"statistic is {self.statistic!r}, must be 'released' or 'paper'")


def attention_mass(probabilities: Tensor, masked: Tensor) -> Tensor:
    """(T,) what (H, W, T) window rows pay each position, summed; -inf where ``masked``."""
    return probabilities.sum(dim=(0, 1)).masked_fill(masked, -torch.inf)


def most_attended(probabilities: Tensor, masked: Tensor, count: int) -> Tensor:
    """The unmasked positions that the window pays most attention to.

    Args:
        probabilities: (H, W, T) attention of the W window rows.
        masked: (T,) bool, positions that cannot be tracked.
        count: how many; fewer if fewer are unmasked.

    Returns:
        (n,) positions by falling mass, the sum over heads and window rows; equals by position.
    """
    mass = attention_mass(probabilities, masked)
    return mass.argsort(descending=True, stable=True)[: min(count, int((~masked).sum()))]


@dataclass
class LayersOutput:
    """What one denoising step's walk through the layers yields.

    Attributes:
        hidden: (W, d) output of the last layer of the window's rows.
        similarities: of the tested layers, from layer 0 on.
        stale_from: l*+1, or None if no layer had drifted.
        tracked: (n,) positions for the next step to track, ascending.
    """

    hidden: Tensor
    similarities: list[float]
    stale_from: int | None
    tracked: Tensor


class ElasticCache:
    """One request being decoded; ``step`` runs one denoising step.

    Attributes:
        canvas: its tokens so far.
        cache: keys, values and hidden states, as the last step left them.
        tracked: (n,) positions that the next step tracks.
        committed: (n,) positions that the last step committed.
        appended: (n,) positions that the canvas has grown by since.
        stale_from: where everyone joins the coming step (refresh "next"), or None.
        result: the record so far.
    """

    def __init__(self, model: LLaDA, canvas: Canvas, options: ElasticOptions) -> None:
        self.model, self.canvas, self.options = model, canvas, options
        self.cache = LayerCache(model, len(canvas))
        self.tracked = self.committed = self.appended = canvas.everywhere[:0]
        self.stale_from: int | None = None
        self.result = DecodingResult()

    def rows(self, window: Tensor) -> Tensor:
        """(R,) positions that the coming step computes from layer 0, ascending.

        ``window``: (W,) positions to be predicted.
        """
        if self.result.denoising_steps == 0:
            return self.canvas.everywhere
        reach = self.options.reach
        around = torch.arange(-reach, reach + 1, device=self.model.device)
        near = (self.committed[:, None] + around).flatten()
        near = near[(near >= 0) & (near < len(self.canvas))]
        return union(self.tracked, near, self.canvas.rows_predicting(window), self.appended)

    def run_layers(self, rows: Tensor, predicting: Tensor) -> LayersOutput:
        """All layers for ``rows`` (R,), refreshing from where the attention has drifted.

        ``predicting``: (W,) those of the rows that predict the window.
        """
        model, cache, options = self.model, self.cache, self.options
        last_layer = model.config.n_layers - 1
        # In the first step there is nothing stored to compare with, and nothing tracked.
        testing = len(self.tracked) > 0 and len(self.appended) == 0
        similarities: list[float] = []
        stale_from = None
        tracked: list[Tensor] = []
        hidden, layer = model.embed(self.canvas.tokens[rows]), 0
        while layer < model.config.n_layers:
            if layer == self.stale_from:
                hidden, rows = self.join(layer, hidden, rows), self.canvas.everywhere
                testing = False
            q, k, v = model.project(layer, hidden, rows)
            tests_here = testing and layer % options.hidden_stride == 0
            if tests_here:
                stored = cache.hidden[layer, self.tracked]
                q_before = model.queries(layer, stored, self.tracked)
                before = model.attention_rows(q_before, cache.keys[layer])
            cache.write(layer, rows, hidden, k, v)
            attended = model.attend(q, cache.keys[layer], cache.values[layer])
            hidden = model.finish(layer, hidden, attended)

            of_window = model.attention_rows(q[:, index_in(rows, predicting)], cache.keys[layer])
            tracked.append(most_attended(of_window, self.canvas.masked, options.track_num))
            mass = attention_mass(of_window, self.canvas.masked)
            self.result.close_call(margin.of_ranking(mass, options.track_num))
            layer += 1
            if testing and not tests_here:
                similarities.append(math.nan)
            elif tests_here:
                after = model.attention_rows(
                    q[:, index_in(rows, self.tracked)], cache.keys[layer - 1]
                )
                similarities.append(similarity(before, after, options.statistic))
                self.result.close_call(abs(similarities[-1] - options.gamma))
                drifted = similarities[-1] < options.gamma and layer <= last_layer
                if drifted and options.refresh == "replay":
                    stale_from, testing = layer - layer % options.hidden_stride, False
                    if stale_from < layer:  # back to what is stored, this step's rows included
                        tracked, layer = tracked[:stale_from], stale_from
                        hidden = cache.hidden[layer, rows]
                    hidden, rows = self.join(layer, hidden, rows), self.canvas.everywhere
                elif drifted and stale_from is None:
                    stale_from = layer - layer % options.hidden_stride
        return LayersOutput(
            hidden=hidden[index_in(rows, predicting)],
            similarities=similarities,
            stale_from=stale_from,
            tracked=union(*tracked),
        )

    def join(self, layer: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """(T, d) input of a layer for everyone: stored, but for this step's fresh rows (R, d)."""
        return self.cache.hidden[layer].index_copy(0, rows, hidden)

    def step(self) -> bool:
        """One denoising step; False, without one, if no position is open."""
        window = self.canvas.window(self.options.window)
        if len(window) == 0:
            return False
        rows = self.rows(window)
        output = self.run_layers(rows, self.canvas.rows_predicting(window))

        options = self.options
        committed = commit_predictions(
            self.model, self.canvas, window, output.hidden, options, self.result
        )

        kind = "window" if self.result.denoising_steps else "first"
        row_layers = None
        if self.stale_from is not None:
            kind = "refresh" if self.stale_from else "full"
            layers_above = self.model.config.n_layers - self.stale_from
            joining = len(self.canvas) - len(rows)
            row_layers = len(rows) * self.model.config.n_layers + joining * layers_above
            rows = self.canvas.everywhere
        passes = [(kind, 0, len(rows))]
        self.stale_from = None
        if output.stale_from is not None and options.refresh == "replay":
            passes.append(("replay", output.stale_from, len(self.canvas)))
        elif output.stale_from is not None:
            self.stale_from = output.stale_from
        self.result.record(
            passes,
            committed.tolist(),
            self.model.config.n_layers,
            len(self.canvas),
            output.similarities,
            self.tracked.tolist(),
            row_layers,
        )
        self.tracked, self.committed = output.tracked, committed
        self.appended = self.canvas.grow()
        self.cache.grow(len(self.canvas))
        return True


def elastic_cache(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: ElasticOptions | None = None,
) -> DecodingResult:
    """Decode a request with Elastic-Cache.

    Unlike the record that it keeps, this walks through the layers once per step and computes
    nothing in vain: ``row_layers`` counts an engine's work, thrown-away layers included.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or ElasticOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, *options.of_canvas)
    decoder = ElasticCache(model, canvas, options)
    while decoder.step():
        pass
    return decoder.result.finish(canvas)
