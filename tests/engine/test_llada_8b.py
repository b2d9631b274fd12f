# SPDX-License-Identifier: Apache-2.0
"""LLaDA-8B's released config.json, two of its 32 layers, dummy weights in bfloat16: 3 GB."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .full_width import full_width

pytestmark = pytest.mark.engine

# GSAI-ML/LLaDA-8B-Instruct. `auto_map` names remote code, which must not be asked for; there is
# no generation_config.json.
CONFIG: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        "AutoModel": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 4096,
    "embedding_dropout": 0.0,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}
LAYERS = 2
KEYS_VALUES = 2 * 4096 * 2 * LAYERS  # bytes a position
HIDDEN_STATES = 4096 * 2 * (LAYERS - 1)


@pytest.mark.slow
def test_released_config_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_elastic.runner import runner

    lines: list[str] = []
    # No handler of ours: when vLLM configures its loggers, it takes them off.
    monkeypatch.setattr(runner.logger, "info", lambda line, *args: lines.append(line % args))
    with full_width(
        tmp_path,
        CONFIG | {"n_layers": LAYERS},
        batch_size=2,
        max_model_len=1024,
        kv_cache_memory_bytes=128 << 20,
    ) as engine:
        assert (engine.mask_token_id, engine.eos_token_id) == (126336, 126081)
        (line,) = [line for line in lines if line.startswith("a canvas position costs")]
        assert f"costs {KEYS_VALUES + HIDDEN_STATES} bytes ({HIDDEN_STATES} of them hidden" in line
        canvases = (128 << 20) // (KEYS_VALUES + HIDDEN_STATES) // 1024
        assert f"{canvases} full canvases of 1024 positions fit" in line
        prompt = list(range(126100, 126120))
        results = engine.run(
            [
                {"prompt_token_ids": prompt, "max_tokens": 9, "elastic_policy": policy}
                for policy in ("elastic", "none")
            ]
        )
        for result in results:
            assert 0 < len(result["token_ids"]) <= 9
            assert max(result["token_ids"]) < 126464
            assert 126336 not in result["token_ids"], "the mask is no answer"
