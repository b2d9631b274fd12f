# SPDX-License-Identifier: Apache-2.0
"""Attention kernels whose blocks are smaller than the KV cache manager's: the oracle's answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from vllm_elastic.config import BLOCK_SIZE

# Imported before the kernels are told something else: it reads what they really want.
from vllm_elastic.engine import engine_config  # noqa: F401
from vllm_elastic.reference import LLaDA

from .agreement import agrees
from .conftest import RANDOM_MODELS, Served, make_engine, random_config
from .test_oracle import CONFIGS, ask_oracle, problems

pytestmark = pytest.mark.engine

NAMES = ["none", "released-high", "paper-high", "block", "block-fine", "next-low", "dual-cache"]


@pytest.mark.slow
def test_equals_oracle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashAttention 4 may on Blackwell: rows would be read from and written to the blocks of
    other requests. vLLM's CPU kernels split nothing by themselves; here they are told to."""
    sizes = staticmethod(lambda kv_cache_spec=None: [BLOCK_SIZE])
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", sizes)
    oracle = LLaDA.random(random_config(**RANDOM_MODELS["gqa-tied"]), seed=3)
    oracle.save_pretrained(tmp_path)
    engine = make_engine(tmp_path, block_size=3 * BLOCK_SIZE)
    assert engine.runner.cache.block_size == 3 * BLOCK_SIZE
    assert engine.runner.cache.key_layout.block_size == BLOCK_SIZE
    served = Served("gqa-tied", tmp_path, oracle, engine)
    asked = [(*problem, name) for problem in problems(8) for name in NAMES]
    results = engine.run(
        [
            {"prompt_token_ids": prompt, "max_tokens": max_tokens}
            | {f"elastic_{key}": value for key, value in CONFIGS[name].items()}
            for prompt, max_tokens, name in asked
        ]
    )
    equal = [
        agrees(result, ask_oracle(served, prompt, max_tokens, CONFIGS[name]), (name, len(prompt)))
        for (prompt, max_tokens, name), result in zip(asked, results, strict=True)
    ]
    assert equal.count(False) <= len(equal) / 50
