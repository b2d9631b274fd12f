# SPDX-License-Identifier: Apache-2.0
"""From vLLM's sampling parameters to what the decoder wants to know."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

from vllm.sampling_params import SamplingParams

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.sampling import Sampling


def end_token_ids_of(params: SamplingParams) -> set[int]:
    """What ends this request's answer: its stop tokens, and the end token unless it ignores it."""
    end_token_ids = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        end_token_ids.add(params.eos_token_id)
    return end_token_ids


def text_end_ids_of(hf_config: Any) -> tuple[int, ...]:
    """The model's end-of-text, then its end-of-turn where it has one."""
    ends = (hf_config.eos_token_id, getattr(hf_config, "eot_token_id", None))
    return tuple(token_id for token_id in ends if token_id is not None)


def sampling_of(
    params: SamplingParams,
    config: ElasticConfig,
    prompt_length: int,
    mask_token_id: int,
    end_token_ids: set[int],
    text_end_ids: tuple[int, ...] = (),
) -> Sampling | None:
    """The request's wishes; None where the plain most probable token is all it wants.

    A request without a seed gets a random one. Infilling finds no end token ahead of a token that
    the request fixed.

    Args:
        end_token_ids: from ``end_token_ids_of``.
        text_end_ids: from ``text_end_ids_of``.
    """
    first_end = params.min_tokens
    for offset, token_id in enumerate(config.canvas or ()):
        if token_id != mask_token_id:
            first_end = max(first_end, offset + 1)
    sampling = Sampling(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        logit_bias=tuple((params.logit_bias or {}).items()),
        allowed_token_ids=tuple(params.allowed_token_ids) if params.allowed_token_ids else None,
        banned_token_ids=tuple(ids[0] for ids in params.bad_words_token_ids or ())
        + (text_end_ids[:1] if config.logits_eos_inf else ()),
        unconfident_token_ids=text_end_ids if config.confidence_eos_eot_inf else (),
        end_token_ids=tuple(sorted(end_token_ids)) if first_end else (),
        first_end_position=prompt_length + first_end if first_end else 0,
        num_logprobs=params.num_logprobs,
    )
    if sampling == Sampling() and config.remasking != "random":
        return None
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return replace(sampling, seed=seed)
