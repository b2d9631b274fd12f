# SPDX-License-Identifier: Apache-2.0
"""Decoding without a cache: every denoising step recomputes the whole canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import margin
from .canvas import Canvas
from .commit import CommitOptions, Evidence, candidates, choose, entropies, without
from .llada import LLaDA
from .result import DecodingResult


@dataclass(frozen=True)
class DecodingOptions(CommitOptions):
    """``window``: beta, the first this many open positions are predicted in a step."""

    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window is {self.window}, must be at least 1")


def commit_predictions(
    model: LLaDA,
    canvas: Canvas,
    window: Tensor,
    hidden: Tensor,
    options: CommitOptions,
    result: DecodingResult,
) -> Tensor:
    """The end of every step: predict the window, commit what is confident enough.

    ``window`` (W,) positions, ``hidden`` (W, d) the last layer's output of the rows that predict
    them. Returns (n,) the positions committed, and tells ``result`` by what margin.

    With a grammar the window's first position, before which all is decided, is predicted among the
    tokens that may come next, and committed whatever the rule; behind it commits end where the rule
    leaves one out or the grammar does.
    """
    logits, mask = model.head(hidden), model.config.mask_token_id
    answer = canvas.tokens[canvas.prompt_length : int(window[0])].tolist()
    if options.grammar is not None:
        next_ones = set(options.grammar(answer))
        others = [token for token in range(logits.shape[1]) if token not in next_ones]
        logits = torch.cat([without(logits[:1], others), logits[1:].double()])
    token_ids, confidence = candidates(logits, mask, options.never, options.unconfident)
    if options.commit == "credit" and options.tokens_per_step is None:
        confidence = result.credited(window, token_ids, confidence, options)
    evidence = Evidence(
        entropies(logits, mask, options.never) if options.commit == "entropy" else None,
        result.lasting(window, token_ids, confidence),
    )
    chosen = choose(confidence, window, options, evidence)
    if options.grammar is not None:
        chosen[0] = True
        for index, token_id in enumerate(token_ids.tolist()):
            if not chosen[index] or token_id not in options.grammar(answer):
                chosen[index:] = False
                break
            answer.append(token_id)
    canvas.commit(window[chosen], token_ids[chosen])
    # Where which token it is decides about a row, those that are not committed decide, too.
    by_token = options.unconfident or options.grammar or options.commit in ("steady", "credit")
    deciding = logits if by_token else logits[chosen]
    result.close_call(
        margin.of_commit(confidence, window, options, evidence),
        margin.of_candidates(without(deciding, (mask, *options.never))),
    )
    return window[chosen]


def decode(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: DecodingOptions | None = None,
) -> DecodingResult:
    """Same window, threshold and EOS rule as Elastic-Cache, and no cache: policy ``none``.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or DecodingOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, *options.of_canvas)
    result = DecodingResult()
    while len(window := canvas.window(options.window)):
        hidden = model.forward(canvas.tokens)[canvas.rows_predicting(window)]
        committed = commit_predictions(model, canvas, window, hidden, options, result)
        kind = "full" if result.denoising_steps else "first"
        result.record(
            [(kind, 0, len(canvas))], committed.tolist(), model.config.n_layers, len(canvas)
        )
        canvas.grow()
    return result.finish(canvas)
