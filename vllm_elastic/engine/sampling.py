# SPDX-License-Identifier: Apache-2.0
"""From vLLM's sampling parameters to what the decoder wants to know."""

from __future__ import annotations

from dataclasses import replace

from vllm.sampling_params import SamplingParams

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.commits import COMMIT_RULES
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.decoding.traits import DecodingTraits


def end_token_ids_of(params: SamplingParams) -> set[int]:
    """What ends this request's answer: its stop tokens, and the end token unless it ignores it."""
    end_token_ids = set(params.stop_token_ids or ())
    if params.eos_token_id is not None:
        end_token_ids.add(params.eos_token_id)
    return end_token_ids


def sampling_of(
    params: SamplingParams,
    config: ElasticConfig,
    prompt_length: int,
    traits: DecodingTraits,
    end_token_ids: set[int],
    seed: int = 0,
) -> Sampling | None:
    """The request's wishes; None where the plain most probable token is all it wants.

    Infilling finds no end token ahead of a token that the request fixed.

    Args:
        end_token_ids: from ``end_token_ids_of``.
        seed: of a request that names none.
    """
    first_end = params.min_tokens
    for offset, token_id in enumerate(config.canvas or ()):
        if token_id != traits.mask_token_id:
            first_end = max(first_end, offset + 1)
    sampling = Sampling(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        logit_bias=tuple((params.logit_bias or {}).items()),
        allowed_token_ids=tuple(params.allowed_token_ids) if params.allowed_token_ids else None,
        banned_token_ids=_banned(params, config, traits),
        unconfident_token_ids=traits.text_end_ids if config.confidence_eos_eot_inf else (),
        end_token_ids=tuple(sorted(end_token_ids)) if first_end else (),
        first_end_position=prompt_length + first_end if first_end else 0,
        entropies=COMMIT_RULES[config.commit].needs_entropies and not config.fixed_steps,
        alg=config.alg,
        num_logprobs=params.num_logprobs,
    )
    if sampling == Sampling() and config.remasking != "random":
        return None
    return replace(sampling, seed=seed if params.seed is None else params.seed)


def _banned(
    params: SamplingParams, config: ElasticConfig, traits: DecodingTraits
) -> tuple[int, ...]:
    banned = [token_ids[0] for token_ids in params.bad_words_token_ids or ()]
    if params.ignore_eos:
        # An answer of the length that was asked for, as benchmarks mean it, is one of text. A
        # canvas that has ended would be filled up with end tokens.
        stop_token_ids = params.stop_token_ids or ()
        banned += [token_id for token_id in traits.text_end_ids if token_id not in stop_token_ids]
    if config.logits_eos_inf and traits.end_of_text_id is not None:
        banned.append(traits.end_of_text_id)
    return tuple(banned)
