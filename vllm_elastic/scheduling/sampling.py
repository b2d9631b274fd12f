# SPDX-License-Identifier: Apache-2.0
"""From vLLM's sampling parameters to what the decoder wants to know."""

from __future__ import annotations

import secrets
from dataclasses import replace

from vllm.sampling_params import SamplingParams

from vllm_elastic.decoding.sampling import Sampling


def sampling_of(
    params: SamplingParams, prompt_length: int, end_token_ids: set[int]
) -> Sampling | None:
    """The request's wishes; None where the plain most probable token is all it wants.

    A request without a seed gets a random one.
    """
    sampling = Sampling(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        logit_bias=tuple((params.logit_bias or {}).items()),
        allowed_token_ids=tuple(params.allowed_token_ids) if params.allowed_token_ids else None,
        banned_token_ids=tuple(ids[0] for ids in params.bad_words_token_ids or ()),
        end_token_ids=tuple(sorted(end_token_ids)) if params.min_tokens else (),
        first_end_position=prompt_length + params.min_tokens if params.min_tokens else 0,
        num_logprobs=params.num_logprobs,
    )
    if sampling == Sampling():
        return None
    seed = secrets.randbits(63) if params.seed is None else params.seed
    return replace(sampling, seed=seed)
