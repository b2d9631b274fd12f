# SPDX-License-Identifier: Apache-2.0
"""The parts that the oracle's decoders take of Transformers' Qwen2, against the whole."""

from __future__ import annotations

import pytest
import torch

from tests.qwen2_oracle import Qwen2Oracle, small_config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_parts_make_the_whole_under_a_full_mask(length: int, tied: bool) -> None:
    oracle = Qwen2Oracle(small_config(tie_word_embeddings=tied), seed=1)
    tokens = torch.randint(0, 293, (length,), generator=torch.Generator().manual_seed(length))
    hides_nothing = torch.zeros(1, 1, length, length)
    with torch.inference_mode():
        whole = oracle.model(tokens[None], attention_mask=hides_nothing).logits[0]
        causal = oracle.model(tokens[None]).logits[0]
        parts = oracle.head(oracle.forward(tokens))
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=2e-5)
    if length > 1:
        assert not torch.allclose(causal, whole, atol=1e-2), "the mask was taken"
