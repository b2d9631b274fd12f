# SPDX-License-Identifier: Apache-2.0
"""From vLLM's sampling parameters to the decoder's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.traits import DecodingTraits
from vllm_elastic.engine.sampling import end_token_ids_of, sampling_of
from vllm_elastic.models.registry import traits_of

END, TURN, MASK = 0, 3, 1


def traits(**hf_config: Any) -> DecodingTraits:
    known = {"architectures": ["LLaDAModelLM"], "num_hidden_layers": 2, "vocab_size": 9}
    return traits_of(SimpleNamespace(**known, mask_token_id=MASK, **hf_config))


def params_of(**values: Any) -> SamplingParams:
    """As vLLM hands them to the engine: with the model's end token unless it is ignored."""
    params = SamplingParams(temperature=0.0, **values)
    params.update_from_generation_config({}, END)
    return params


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {END}),
        ({"stop_token_ids": [7, 9]}, {END, 7, 9}),
        ({"ignore_eos": True}, set()),
        ({"ignore_eos": True, "stop_token_ids": [7]}, {7}),
    ],
)
def test_end_tokens(values: dict[str, Any], expected: set[int]) -> None:
    assert end_token_ids_of(params_of(**values)) == expected


def test_end_tokens_without_a_tokenizer() -> None:
    """vLLM knows of no end token then."""
    assert end_token_ids_of(SamplingParams(stop_token_ids=[7])) == {7}


def test_the_set_is_the_caller_s_own() -> None:
    params = params_of(stop_token_ids=[7])
    end_token_ids_of(params).add(8)
    assert params.stop_token_ids == [7]


@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        ({"eos_token_id": END, "eot_token_id": TURN}, (END, TURN)),
        ({"eos_token_id": END, "eot_token_id": None}, (END,)),
        ({"eos_token_id": END}, (END,)),
        ({"eos_token_id": None, "eot_token_id": TURN}, (TURN,)),
    ],
)
def test_ends_of_text(hf_config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert traits(**hf_config).text_end_ids == expected


def test_where_they_go() -> None:
    """The request's ends bind min_tokens; the model's are LLaDA's own switches."""
    config = ElasticConfig(logits_eos_inf=True, confidence_eos_eot_inf=True)
    params = params_of(min_tokens=2, stop_token_ids=[7])
    model = traits(eos_token_id=END, eot_token_id=TURN)
    sampling = sampling_of(params, config, 10, model, end_token_ids_of(params))
    assert sampling is not None
    assert (sampling.end_token_ids, sampling.first_end_position) == ((END, 7), 12)
    assert (sampling.banned_token_ids, sampling.unconfident_token_ids) == ((END,), (END, TURN))
