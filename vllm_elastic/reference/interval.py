# SPDX-License-Identifier: Apache-2.0
"""The whole canvas every so many steps, the window and what was just committed in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .canvas import Canvas, index_in, union
from .decoding import DecodingOptions, commit_predictions
from .layer_cache import LayerCache
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class IntervalOptions(DecodingOptions):
    """``interval``: denoising steps from one refresh to the next."""

    interval: int = 8


def interval(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: IntervalOptions | None = None,
) -> DecodingResult:
    """Decode with a fixed schedule: policy ``interval``.

    Positions that the canvas has grown by are computed in the step that sees them first.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or IntervalOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, *options.of_canvas)
    cache, result = LayerCache(model, len(canvas)), DecodingResult()
    committed = appended = canvas.everywhere[:0]
    while len(window := canvas.window(options.window)):
        predicting = canvas.rows_predicting(window)
        rows = union(predicting, committed, appended)
        kind = "window"
        if result.denoising_steps % options.interval == 0:
            rows, kind = canvas.everywhere, "full" if result.denoising_steps else "first"
        hidden = cache.run(canvas.tokens, rows)[index_in(rows, predicting)]
        committed = commit_predictions(model, canvas, window, hidden, options, result)
        result.record(
            [(kind, 0, len(rows))], committed.tolist(), model.config.n_layers, len(canvas)
        )
        appended = canvas.grow()
        cache.grow(len(canvas))
    return result.finish(canvas)
