# SPDX-License-Identifier: Apache-2.0
"""Small random LLaDAs. Their 8 to 100 tokens make ends and ties of all kinds likely."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from vllm_elastic.reference import LLaDA, LLaDAConfig

# heads, KV heads, tied head: one of each kind of sharing.
SHAPES = {
    "mha": (4, 4, False),
    "gqa": (4, 2, False),
    "mqa-tied": (4, 1, True),
    "gqa6-tied": (6, 3, True),
}


@cache
def random_llada(
    shape: str = "mha", seed: int = 0, vocab: int = 14, layers: int = 4, shift: int = 0
) -> LLaDA:
    """Mask: the last token. EOS: the one before. Two rows of padding in the embedding."""
    heads, kv_heads, tied = SHAPES[shape]
    config = LLaDAConfig(
        d_model=8 * heads,
        n_heads=heads,
        n_kv_heads=kv_heads,
        n_layers=layers,
        mlp_hidden_size=40,
        vocab_size=vocab,
        embedding_size=vocab + 2,
        max_sequence_length=96,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        weight_tying=tied,
        mask_token_id=vocab - 1,
        eos_token_id=vocab - 2,
        logits_shift=shift,
    )
    return LLaDA.random(config, seed=seed)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llada() -> Callable[..., LLaDA]:
    return random_llada


@pytest.fixture(scope="session")
def endless() -> Callable[..., LLaDA]:
    """As ``llada``, but no token ends an answer."""

    def make(*args, **kwargs) -> LLaDA:
        model = random_llada(*args, **kwargs)
        return LLaDA(replace(model.config, eos_token_id=None), model.weights)

    return make
