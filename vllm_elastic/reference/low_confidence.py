# SPDX-License-Identifier: Apache-2.0
"""LLaDA's own decoding: a fixed number of steps over blocks of text, low-confidence remasking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import margin
from .canvas import Canvas
from .commit import candidates, most_confident, without
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class LowConfidenceOptions:
    """LLaDA's knobs: ``steps`` over the whole response, ``block_length`` positions a block.

    ``never`` and ``unconfident``: token ids, see ``candidates``. ``grow_by``: see ``Canvas``; a
    multiple of ``block_length``.
    """

    steps: int = 128
    block_length: int = 32
    never: tuple[int, ...] = ()
    unconfident: tuple[int, ...] = ()
    grow_by: int = 0


def tokens_to_transfer(masked: int, steps: int) -> list[int]:
    """How many of a block's masks each of its steps decodes; the first steps take the rest.

    As LLaDA's generation code shares them out: 10 masks in 4 steps are 3, 3, 2, 2.
    """
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


def low_confidence(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: LowConfidenceOptions | None = None,
) -> DecodingResult:
    """LLaDA's low-confidence schedule at temperature 0, without a cache and without early end.

    Blocks are decoded left to right; in each step the block's most confident predictions are
    kept and the others masked again. An EOS drops nothing. A step whose share is no token
    (more steps than masks) still runs, as it does in LLaDA's code.

    Raises:
        ValueError: the response is not a whole number of blocks, or the steps are not shared
            evenly by the blocks (LLaDA's code asserts both); else see ``Canvas``.
    """
    options = options or LowConfidenceOptions()
    length = options.block_length
    if length < 1 or max_tokens % length:
        raise ValueError(f"{max_tokens} tokens are not a whole number of blocks of {length}")
    blocks = max_tokens // length
    if options.steps < 1 or options.steps % blocks:
        raise ValueError(f"{options.steps} steps cannot be shared evenly by {blocks} blocks")
    canvas = Canvas(model, prompt_ids, max_tokens, grow_by=options.grow_by)
    result = DecodingResult()
    for start in range(canvas.prompt_length, canvas.prompt_length + max_tokens, length):
        canvas.grow()
        for count in tokens_to_transfer(length, options.steps // blocks):
            hidden = model.forward(canvas.tokens)
            left = start + canvas.masked[start : start + length].nonzero().flatten()
            logits = model.head(hidden[canvas.rows_predicting(left)])
            mask = model.config.mask_token_id
            token_ids, confidence = candidates(logits, mask, options.never, options.unconfident)
            chosen = most_confident(confidence, count)
            if count:
                deciding = logits if options.unconfident else logits[chosen]
                predicted = without(deciding, (mask, *options.never))
                result.close_call(
                    margin.of_ranking(confidence, count), margin.of_candidates(predicted)
                )
            canvas.tokens[left[chosen]] = token_ids[chosen]
            canvas.masked[left[chosen]] = False
            kind = "full" if result.denoising_steps else "first"
            result.record(
                [(kind, 0, len(canvas))], left[chosen].tolist(), model.config.n_layers, len(canvas)
            )
    return result.finish(canvas)
