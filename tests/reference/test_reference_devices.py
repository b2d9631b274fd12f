# SPDX-License-Identifier: Apache-2.0
"""Every decoder makes its tensors where the model is, and in its dtype."""

from __future__ import annotations

import pytest
import torch

from tests.device import DEVICE
from vllm_elastic.reference import (
    DecodingOptions,
    DiffusionOptions,
    DualCacheOptions,
    ElasticBlockOptions,
    ElasticOptions,
    IntervalOptions,
    LLaDA,
    LowConfidenceOptions,
    decode,
    diffusion,
    dual_cache,
    elastic_block,
    elastic_cache,
    interval,
    low_confidence,
)

BLOCK = dict(granularity=4, block_drift=0.05, threshold=0.5, reach=1)
DECODERS = {
    "none": (decode, DecodingOptions(window=5)),
    "interval": (interval, IntervalOptions(window=5, interval=3)),
    "dual-cache": (dual_cache, DualCacheOptions(block_length=5)),
    "elastic": (elastic_cache, ElasticOptions(window=5, reach=1)),
    "elastic-next": (elastic_cache, ElasticOptions(window=5, refresh="next")),
    "elastic-block": (elastic_block, ElasticBlockOptions(window=6, **BLOCK)),
    "elastic-block-replay": (elastic_block, ElasticBlockOptions(refresh="replay", **BLOCK)),
    "fixed-steps": (low_confidence, LowConfidenceOptions(steps=8, block_length=4)),
    "dream-sure": (diffusion, DiffusionOptions(steps=6, alg="maskgit_plus")),
    "dream-margin": (diffusion, DiffusionOptions(steps=6, alg="topk_margin")),
    "dream-entropy": (diffusion, DiffusionOptions(steps=6, alg="entropy")),
}


@pytest.mark.parametrize("name", DECODERS)
def test_tensors_are_made_where_the_model_is(llada, name):
    """With another device as torch's default, as for a model on a GPU the CPU is another."""
    decoder, options = DECODERS[name]
    model = llada("gqa", vocab=30)
    here = decoder(model, [3, 1, 4], 16, options)
    with torch.device("meta"):
        same = LLaDA(model.config, model.weights)
        assert same.device == model.device
        there = decoder(same, [3, 1, 4], 16, options)
    assert there == here


def test_random_weights_are_the_same_anywhere(llada):
    config = llada("gqa").config
    here = LLaDA.random(config, seed=4)
    with torch.device("meta"):
        there = LLaDA.random(config, seed=4)
    assert there.device == here.device
    assert all(torch.equal(here.weights[name], there.weights[name]) for name in here.weights)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="of two devices, and there is one")
@pytest.mark.parametrize("name", DECODERS)
def test_a_model_elsewhere_decodes_the_same(llada, name):
    decoder, options = DECODERS[name]
    model = llada("gqa", vocab=30)
    elsewhere = LLaDA(model.config, {k: w.to(DEVICE) for k, w in model.weights.items()})
    assert elsewhere.device.type == DEVICE.type
    here, there = (decoder(each, [3, 1, 4], 16, options) for each in (model, elsewhere))
    assert (there.token_ids, there.steps) == (here.token_ids, here.steps)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16(endless, name, shift):
    decoder, options = DECODERS[name]
    wide = endless("gqa", vocab=30, shift=shift)
    model = LLaDA(wide.config, {k: w.to(torch.bfloat16) for k, w in wide.weights.items()})
    result = decoder(model, [3, 1, 4], 16, options)
    assert sorted(p for s in result.steps for p in s["committed"]) == list(range(3, 19))
    assert model.config.mask_token_id not in result.token_ids
