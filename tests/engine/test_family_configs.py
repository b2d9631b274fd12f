# SPDX-License-Identifier: Apache-2.0
"""How a config.json is told and read: by ``architectures``, key by key, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .full_width import full_width

pytestmark = pytest.mark.engine

# What is known of GSAI-ML/iLLaDA-8B-Instruct: the paper's table and the authors' configuration
# class. Not known: rope_theta, rms_norm_eps and the model type; they are made up here.
ILLADA: dict[str, Any] = {
    "architectures": ["ILLaDAForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "layer_norm_eps": None,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "nobody-knows",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 155136,
}
# inclusionAI/LLaDA-MoE-7B-A1B-Instruct: the keys are those of the authors' configuration class,
# the sizes third parties', which give the 7.35 B parameters that are published.
LLADA_MOE: dict[str, Any] = {
    "architectures": ["LLaDAMoEModelLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "dense_intermediate_size": 8192,
    "eos_token_id": 156892,
    "expert_intermediate_size": 1024,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "max_position_embeddings": 8192,
    "model_type": "llada",
    "moe_layer_freq": [1] * 16,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "norm_topk_prob": None,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "pad_token_id": 156892,
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 50000,
    "routed_scaling_factor": 1,
    "router_num_group": None,
    "router_topk_group": None,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 157184,
}
LLADA: dict[str, Any] = {"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": 256}
LLAMA: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
KINDS = {"illada": ILLADA, "llada-moe": LLADA_MOE}


def read(directory: Path, raw: dict[str, Any], **options: Any) -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.transformers_utils.config import get_config

    load_general_plugins()
    (directory / "config.json").write_text(json.dumps(raw))
    return get_config(directory, trust_remote_code=False, **options)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (ILLADA, "ILLaDAConfig"),
        (ILLADA | {"model_type": "llada"}, "ILLaDAConfig"),
        (ILLADA | {"model_type": "llama"}, "ILLaDAConfig"),
        ({k: v for k, v in ILLADA.items() if k != "model_type"}, "ILLaDAConfig"),
        (LLADA_MOE, "LLaDAMoEConfig"),
        (LLADA, "LLaDAConfig"),
        (LLAMA, "LlamaConfig"),
        (LLAMA | {"architectures": None}, "LlamaConfig"),
    ],
)
def test_architectures_decide(tmp_path: Path, raw: dict[str, Any], expected: str) -> None:
    """Three families say model_type llada."""
    assert type(read(tmp_path, raw)).__name__ == expected


def test_an_override_decides(tmp_path: Path) -> None:
    raw = ILLADA | {"architectures": ["SomebodysModel"]}
    overrides = {"architectures": ["ILLaDAForCausalLM"]}
    config = read(tmp_path, raw, hf_overrides_kw=overrides)
    assert type(config).__name__ == "ILLaDAConfig"
    assert config.architectures == ["ILLaDAForCausalLM"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("illada", {"mask": 5, "ends": (2,), "grow_by": 32, "layers": 32, "rope": 500000.0}),
        (
            "llada-moe",
            {"mask": 156895, "ends": (156892,), "grow_by": 0, "layers": 16, "rope": 50000.0},
        ),
    ],
)
def test_what_decoding_knows_of_it(tmp_path: Path, kind: str, expected: dict[str, Any]) -> None:
    """LLaDA-8B's mask, 126336, is an ordinary token of iLLaDA's vocabulary."""
    from vllm_elastic.models.registry import traits_of

    config = read(tmp_path, KINDS[kind])
    traits = traits_of(config)
    assert {
        "mask": traits.mask_token_id,
        "ends": traits.text_end_ids,
        "grow_by": traits.grow_by,
        "layers": traits.num_layers,
        "rope": config.rope_theta,
    } == expected


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *((kind, key) for kind in KINDS for key in ("rope_theta", "rms_norm_eps", "vocab_size")),
        *((kind, key) for kind in KINDS for key in ("num_key_value_heads", "hidden_size")),
        ("illada", "intermediate_size"),
        ("llada-moe", "expert_intermediate_size"),
        ("llada-moe", "num_experts_per_tok"),
    ],
)
def test_a_missing_key_is_named(tmp_path: Path, kind: str, key: str) -> None:
    raw = {k: v for k, v in KINDS[kind].items() if k != key}
    with pytest.raises(ValueError, match=f"config: {key} must be given"):
        read(tmp_path, raw)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("illada", {"layer_norm_eps": 1e-5}),
        ("illada", {"mlp_bias": True}),
        ("illada", {"hidden_act": "gelu"}),
        ("illada", {"rope_scaling": {"rope_type": "yarn", "factor": 4}}),
        ("illada", {"rope_scaling": {"type": "linear", "factor": 2}}),
        ("illada", {"rope_parameters": {"rope_theta": 1e4, "long_factor": [1.0]}}),
        ("illada", {"mask_token_id": 155136}),
        ("illada", {"num_key_value_heads": 5}),
        ("illada", {"head_dim": 64}),
        ("llada-moe", {"clip_qkv": 8.0}),
        ("llada-moe", {"qk_layernorm": False}),
        ("llada-moe", {"shared_expert_intermediate_size": 1024}),
        ("llada-moe", {"moe_router_enable_expert_bias": True}),
        ("llada-moe", {"moe_router_score_function": "sigmoid"}),
        ("llada-moe", {"moe_layer_freq": [0] + [1] * 15}),
        ("llada-moe", {"partial_rotary_factor": 0.5}),
        ("llada-moe", {"routed_scaling_factor": 2.5}),
        ("llada-moe", {"router_num_group": 8}),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(ValueError, match=f"config: .*{key}"):
        read(tmp_path, KINDS[kind] | change)


@pytest.mark.parametrize("change", [{"hidden_size": 4096}, {"num_experts": 64}])
def test_another_familys_keys_are_no_llada_8b(tmp_path: Path, change: dict[str, Any]) -> None:
    """LLaDA-8B's sizes would silently take their place."""
    with pytest.raises(ValueError, match=f"LLaDA config: {next(iter(change))} is no key"):
        read(tmp_path, LLADA | change)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "default", "factor": 1}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    ],
)
def test_both_spellings_of_plain_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    assert read(tmp_path, ILLADA | rope).rope_theta == 1e6


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_full_size_config_runs(kind: str, tmp_path: Path) -> None:
    """Two layers with dummy weights in bfloat16: 2.6 and 2.5 GB."""

    raw = KINDS[kind] | {"num_hidden_layers": 2}
    if kind == "llada-moe":
        raw["moe_layer_freq"] = [1, 1]
    with full_width(
        tmp_path, raw, batch_size=2, max_model_len=1024, kv_cache_memory_bytes=64 << 20
    ) as engine:
        prompt = list(range(1000, 1020))
        results = engine.run(
            [
                {"prompt_token_ids": prompt, "max_tokens": 9, "elastic_policy": policy}
                for policy in ("elastic-block", "none")
            ]
        )
        for result in results:
            assert 0 < len(result["token_ids"]) <= 9
            assert max(result["token_ids"]) < raw["vocab_size"]
            assert engine.mask_token_id not in result["token_ids"], "the mask is no answer"
