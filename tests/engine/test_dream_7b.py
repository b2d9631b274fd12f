# SPDX-License-Identifier: Apache-2.0
"""DiffuCoder-7B's released config.json, two of its 28 layers, dummy weights in bfloat16: 3 GB."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.qwen2_oracle import DREAM

from .full_width import full_width

pytestmark = [pytest.mark.engine, pytest.mark.long]

LAYERS = 2
KEYS_VALUES = 2 * 4 * 128 * 2 * LAYERS  # bytes a position: 4 KV heads of 128
HIDDEN_STATES = 3584 * 2 * (LAYERS - 1)


def test_released_config_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_elastic.runner import runner

    lines: list[str] = []
    # No handler of ours: when vLLM configures its loggers, it takes them off.
    monkeypatch.setattr(runner.logger, "info", lambda line, *args: lines.append(line % args))
    with full_width(
        tmp_path,
        DREAM | {"num_hidden_layers": LAYERS},
        batch_size=2,
        max_model_len=1024,
        kv_cache_memory_bytes=128 << 20,
    ) as engine:
        assert (engine.mask_token_id, engine.eos_token_id) == (151666, 151643)
        (line,) = [line for line in lines if line.startswith("a canvas position costs")]
        # Pages of hidden states and of keys and values are of different sizes here.
        assert f"costs {KEYS_VALUES + HIDDEN_STATES} bytes ({HIDDEN_STATES} of them hidden" in line
        prompt = list(range(100, 120))
        results = engine.run(
            [
                {"prompt_token_ids": prompt, "max_tokens": 4, "elastic_policy": "elastic-block"},
                {"prompt_token_ids": prompt, "max_tokens": 4, "elastic_alg": "entropy"},
            ]
        )
        for result in results:
            assert 0 < len(result["token_ids"]) <= 4
            assert max(result["token_ids"]) < 152064
            assert 151666 not in result["token_ids"], "the mask is no answer"
