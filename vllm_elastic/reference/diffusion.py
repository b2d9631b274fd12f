# SPDX-License-Identifier: Apache-2.0
"""Dream's own decoding (``diffusion_generate``): a fixed number of steps over all masks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import margin
from .canvas import Canvas
from .commit import most_confident, without
from .llada import LLaDA
from .result import DecodingResult


class RandomNumbers(Protocol):
    """Where the uniform numbers come from: whoever compares two decoders gives both the same."""

    def of_tokens(self, step: int, positions: Tensor, count: int) -> Tensor:
        """(n, count) float64 in (0, 1), for every token at (n,) positions."""
        ...

    def of_positions(self, step: int, count: int) -> Tensor:
        """(count,) float64 in (0, 1), for every position of the canvas."""
        ...


@dataclass(frozen=True)
class DiffusionOptions:
    """Dream's knobs, by its names.

    Attributes:
        alg: ``origin`` commits masks by chance; ``maskgit_plus``, ``topk_margin`` and ``entropy``
            the most confident, or with ``alg_temp`` above 0 a draw among them.
        temperature, top_p, top_k: of the tokens. As in vLLM top_k comes first; Dream has top_p
            first, which matters only where both are given.
    """

    steps: int
    alg: Literal["origin", "maskgit_plus", "topk_margin", "entropy"] = "entropy"
    alg_temp: float = 0.0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    eps: float = 1e-3


def shaped(logits: Tensor, options: DiffusionOptions) -> Tensor:
    """(n, vocabulary) logits tempered and filtered. At temperature 0 nothing is filtered: vLLM
    drops top_p and top_k then."""
    if options.temperature == 0:
        return logits
    logits = logits / options.temperature
    for row in logits:  # a view: changed in place
        order = row.argsort(descending=True, stable=True)
        if options.top_k:
            row[order[options.top_k :]] = -torch.inf
        if options.top_p < 1:
            sums = row.softmax(dim=-1)[order].cumsum(dim=-1)
            reached = (sums >= options.top_p).nonzero().flatten()
            if len(reached):  # the token that reaches it is kept
                row[order[int(reached[0]) + 1 :]] = -torch.inf
    return logits


def confidences(probabilities: Tensor, token_ids: Tensor, alg: str) -> Tensor:
    """(n,) of (n, vocabulary) distributions and the (n,) tokens chosen from them."""
    if alg == "topk_margin":
        ranked = probabilities.sort(dim=-1, descending=True).values
        return ranked[:, 0] - ranked[:, 1]
    if alg == "entropy":
        return (probabilities * (probabilities + 1e-10).log()).sum(dim=-1)
    return probabilities.gather(-1, token_ids[:, None])[:, 0]


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise of uniform numbers. Added to log-weights, the largest is a draw in proportion to
    the weights, and the n largest are n draws without replacement."""
    return -(-uniform.log()).log()


def diffusion(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: DiffusionOptions,
    random: RandomNumbers | None = None,
) -> DecodingResult:
    """Every step predicts all masks and commits some, by ``alg``; no blocks, no early end.

    Times t_0 = 1 > ... > t_steps = eps are evenly spaced. Step i commits the share
    1 - t_(i+1) / t_i of the masks that are left, the last step all. Where none is left the rest of
    the steps is not taken: it would change nothing. The mask is no candidate, as everywhere here.

    Args:
        random: needed where a draw is asked for.

    Raises:
        ValueError: see ``Canvas``.
    """
    canvas = Canvas(model, prompt_ids, max_tokens)
    times = torch.linspace(
        1.0, options.eps, options.steps + 1, dtype=torch.float64, device="cpu"
    ).tolist()
    result = DecodingResult()
    for step in range(options.steps):
        left = canvas.masked.nonzero().flatten()
        if not len(left):
            break
        logits = model.head(model.forward(canvas.tokens)[canvas.rows_predicting(left)])
        logits = shaped(without(logits, (model.config.mask_token_id,)), options)
        drawn = logits
        if options.temperature > 0:
            assert random is not None
            drawn = logits + gumbel(random.of_tokens(step, left, logits.shape[1]))
        token_ids = drawn.argmax(dim=-1)
        share = 1 - times[step + 1] / times[step] if step < options.steps - 1 else 1.0
        if options.alg == "origin":
            chosen = torch.ones_like(left, dtype=torch.bool)
            if share < 1:
                assert random is not None
                chosen = random.of_positions(step, len(canvas))[left] < share
        else:
            count = int(len(left) * share)
            priorities = confidences(logits.softmax(dim=-1), token_ids, options.alg)
            if options.alg_temp > 0 and share < 1:
                assert random is not None
                noise = gumbel(random.of_positions(step, len(canvas))[left])
                priorities = priorities / options.alg_temp + noise
            chosen = most_confident(priorities, count)
            result.close_call(margin.of_ranking(priorities, count))
        if chosen.any():
            # A token that is drawn otherwise has another confidence, wherever one counts.
            deciding = drawn if options.alg == "maskgit_plus" else drawn[chosen]
            result.close_call(margin.of_candidates(deciding))
        committed = left[chosen]
        canvas.tokens[committed] = token_ids[chosen]
        canvas.masked[committed] = False
        kind = "full" if result.denoising_steps else "first"
        result.record(
            [(kind, 0, len(canvas))], committed.tolist(), model.config.n_layers, len(canvas)
        )
    return result.finish(canvas)
