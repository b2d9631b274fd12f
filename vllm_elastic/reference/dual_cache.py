# SPDX-License-Identifier: Apache-2.0
"""The fixed refresh of Fast-dLLM's dual cache: the whole canvas once per block of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .canvas import Canvas
from .commit import candidates, choose
from .layer_cache import LayerCache
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class DualCacheOptions:
    """``block_length`` response positions make a block (the last may be shorter).

    The rest is as in ``DecodingOptions``; the block's open positions are the window.
    """

    block_length: int = 32
    threshold: float = 0.9
    tokens_per_step: int | None = None
    drop_after_every_eos: bool = True

    def __post_init__(self) -> None:
        if self.block_length < 1:
            raise ValueError(f"block_length is {self.block_length}, must be at least 1")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"tokens_per_step is {self.tokens_per_step}, must be at least 1")


def dual_cache(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: DualCacheOptions | None = None,
) -> DecodingResult:
    """Decode block by block, left to right.

    A block's first step recomputes the whole canvas; its later steps recompute the block's
    positions, all of them, through all layers, over the stored keys and values of the others.
    A block is done when none of its positions is open; one that is dropped whole takes no step.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or DualCacheOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, options.drop_after_every_eos)
    cache = LayerCache(model, len(canvas))
    result = DecodingResult()
    for start in range(canvas.prompt_length, len(canvas), options.block_length):
        block = canvas.everywhere[start : start + options.block_length]
        rows = canvas.everywhere
        kind = "full" if result.denoising_steps else "first"
        while len(window := canvas.open()[torch.isin(canvas.open(), block)]):
            hidden = model.embed(canvas.tokens[rows])
            for layer in range(model.config.n_layers):
                q, k, v = model.project(layer, hidden, rows)
                cache.write(layer, rows, hidden, k, v)
                attended = model.attend(q, cache.keys[layer], cache.values[layer])
                hidden = model.finish(layer, hidden, attended)
            predicted = model.head(hidden[torch.searchsorted(rows, window)])
            token_ids, confidence = candidates(predicted, model.config.mask_token_id)
            chosen = choose(confidence, options.threshold, options.tokens_per_step)
            canvas.commit(window[chosen], token_ids[chosen])
            result.record(
                [(kind, 0, len(rows))], window[chosen].tolist(), model.config.n_layers, len(canvas)
            )
            rows, kind = block, "window"
    return result.finish(canvas)
