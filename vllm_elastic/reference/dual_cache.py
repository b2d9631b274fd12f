# SPDX-License-Identifier: Apache-2.0
"""The fixed refresh of Fast-dLLM's dual cache: the whole canvas once per block of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .canvas import Canvas, index_in, union
from .commit import CommitOptions
from .decoding import commit_predictions
from .layer_cache import LayerCache
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class DualCacheOptions(CommitOptions):
    """``block_length`` response positions make a block (the last may be shorter).

    The block's open positions are the window.
    """

    block_length: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, must be at least 1")


def dual_cache(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: DualCacheOptions | None = None,
) -> DecodingResult:
    """Decode block by block, left to right.

    A block's first step recomputes the whole canvas; its later steps recompute the block's
    positions, all of them, through all layers, over the stored keys and values of the others.
    With shifted logits the position before the block, which predicts its first, is one of its rows.
    A block is done when none of its positions is open; one that is dropped whole takes no step.
    Positions that the canvas has grown by are computed in the step that sees them first.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or DualCacheOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, *options.of_canvas)
    cache = LayerCache(model, len(canvas))
    result = DecodingResult()
    end = canvas.prompt_length + max_tokens
    for start in range(canvas.prompt_length, end, options.block_length):
        block = canvas.everywhere[start : start + options.block_length]
        block_rows = union(block, canvas.rows_predicting(block))
        rows = canvas.everywhere
        kind = "full" if result.denoising_steps else "first"
        while len(window := canvas.open()[torch.isin(canvas.open(), block)]):
            at = index_in(rows, canvas.rows_predicting(window))
            hidden = cache.run(canvas.tokens, rows)[at]
            committed = commit_predictions(model, canvas, window, hidden, options, result)
            result.record(
                [(kind, 0, len(rows))], committed.tolist(), model.config.n_layers, len(canvas)
            )
            rows, kind = union(block_rows, canvas.grow()), "window"
            cache.grow(len(canvas))
    return result.finish(canvas)
