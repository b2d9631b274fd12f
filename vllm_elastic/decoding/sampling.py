# SPDX-License-Identifier: Apache-2.0
"""What one request wants of its candidates: randomness, forbidden tokens, log probabilities."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sampling:
    """Everything that makes a request's candidates differ from the plain most probable token.

    Random numbers depend on ``seed``, the canvas position, the denoising step and the token only,
    so a request's answer is the same alone and in a batch, replayed or not.

    Attributes:
        temperature: 0 takes the most probable token; else Gumbel-max over logits / temperature.
        top_k: candidates kept, 0 all; top_p, min_p: as in vLLM, over the tempered distribution.
        logit_bias: (token id, bias added to its logit) pairs.
        allowed_token_ids: the only tokens to choose from, or None.
        banned_token_ids: never chosen.
        unconfident_token_ids: may be predicted, but their logits count as -inf where the confidence
            is read, so such a prediction has confidence 0.
        end_token_ids: not chosen at canvas positions before ``first_end_position``.
        entropies: whether the entropy of every prediction is wanted (the commit rule ``entropy``).
        alg: what a prediction's confidence is, by the name of Dream's sampler; None: its
            probability at temperature 1.
        num_logprobs: alternatives to report with each committed token, -1 all, None: no report.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    unconfident_token_ids: tuple[int, ...] = ()
    end_token_ids: tuple[int, ...] = ()
    first_end_position: int = 0
    entropies: bool = False
    alg: str | None = None
    num_logprobs: int | None = None
