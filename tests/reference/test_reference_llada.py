# SPDX-License-Identifier: Apache-2.0
"""LLaDA's forward against transformers' Llama without a causal mask, and piece by piece."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_elastic import reference
from vllm_elastic.reference import LLaDA, LLaDAConfig

SHAPES = ["mha", "gqa", "mqa-tied", "gqa6-tied"]
LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
# The values of LLaDA-8B that matter here, as its config.json has them.
LLADA_8B = {
    "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096,
    "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "weight_tying": False,
    "mask_token_id": 126336, "eos_token_id": 126081,
    "architectures": ["LLaDAModelLM"], "block_type": "llama", "activation_type": "silu",
}  # fmt: skip


def as_llama(model: LLaDA) -> LlamaForCausalLM:
    config = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=config.d_model,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            num_hidden_layers=config.n_layers,
            intermediate_size=config.mlp_hidden_size,
            vocab_size=config.embedding_size,
            max_position_embeddings=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.weight_tying,
            attn_implementation="eager",
        )
    )
    weights = {}
    for name, weight in model.weights.items():
        *_, layer, part, _ = ["", *name.split(".")]
        if part in LLAMA_NAMES and layer.isdigit():
            weights[f"model.layers.{layer}.{LLAMA_NAMES[part]}.weight"] = weight
    weights["model.embed_tokens.weight"] = model.weights["model.transformer.wte.weight"]
    weights["model.norm.weight"] = model.weights["model.transformer.ln_f.weight"]
    head = "wte" if config.weight_tying else "ff_out"
    weights["lm_head.weight"] = model.weights[f"model.transformer.{head}.weight"]
    llama.load_state_dict(weights)
    return llama.eval()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_logits_equal_llama_without_causal_mask(llada, shape, theta):
    model = llada(shape)
    model = LLaDA(replace(model.config, rope_theta=theta), model.weights)
    tokens = torch.randint(0, 14, (37,), generator=torch.Generator().manual_seed(1))
    all_visible = torch.zeros(1, 1, 37, 37)
    with torch.no_grad():
        expected = as_llama(model)(tokens[None], attention_mask=all_visible).logits[0, :, :14]
    torch.testing.assert_close(model.head(model.forward(tokens)), expected, rtol=1e-4, atol=1e-4)


def test_a_causal_mask_would_show(llada):
    model = llada("gqa")
    tokens = torch.arange(9)
    changed = torch.cat([tokens[:-1], torch.tensor([0])])
    difference = (model.forward(tokens) - model.forward(changed)).abs().amax(dim=1)
    assert difference.min() > 1e-3  # every position sees the last one


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_projected_at_their_canvas_positions(llada, shape):
    model = llada(shape)
    hidden = torch.randn(20, model.config.d_model, generator=torch.Generator().manual_seed(2))
    rows = torch.tensor([3, 4, 11, 19])
    of_all = model.project(2, hidden, torch.arange(20))
    of_rows = model.project(2, hidden[rows], rows)
    for everywhere, some in zip(of_all, of_rows, strict=True):
        torch.testing.assert_close(some, everywhere[:, rows])
    torch.testing.assert_close(model.queries(2, hidden[rows], rows), of_rows[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_rows_are_what_attend_weighs_values_with(llada, shape):
    model = llada(shape)
    hidden = torch.randn(20, model.config.d_model, generator=torch.Generator().manual_seed(3))
    q, k, v = model.project(1, hidden, torch.arange(20))
    q = q[:, [0, 7, 8]]
    probabilities = model.attention_rows(q, k)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(model.config.n_heads, 3))
    heads = []
    for head in range(model.config.n_heads):
        group = head // (model.config.n_heads // model.config.n_kv_heads)
        scores = q[head] @ k[group].T / model.config.head_dim**0.5
        torch.testing.assert_close(probabilities[head], scores.softmax(dim=-1))
        heads.append(probabilities[head] @ v[group])
    torch.testing.assert_close(model.attend(q, k, v), torch.cat(heads, dim=-1))


def test_a_checkpoint_comes_back_as_it_was_saved(llada, tmp_path):
    model = llada("gqa6-tied")
    model.save_pretrained(tmp_path)
    loaded = LLaDA.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.weights.keys() == model.weights.keys()
    assert all(torch.equal(loaded.weights[name], w) for name, w in model.weights.items())
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"] == ["LLaDAModelLM"]
    assert raw["model_type"] == "llada"
    assert raw.items() >= asdict(model.config).items()


def test_shards_are_read_together(llada, tmp_path):
    model = llada("mha")
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({n: weights[n] for n in names[:9]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: weights[n] for n in names[9:]}, tmp_path / "model-00002-of-00002.safetensors")
    assert LLaDA.from_pretrained(tmp_path).weights.keys() == model.weights.keys()


def test_random_weights_follow_the_seed(llada):
    config = llada("mha").config
    tokens = torch.arange(12)
    first, again, other = (LLaDA.random(config, seed).forward(tokens) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_bfloat16_is_float32_rounded(llada, tmp_path):
    model = llada("gqa")
    model.save_pretrained(tmp_path)
    half = LLaDA.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = torch.arange(13)
    hidden = half.forward(tokens)
    assert hidden.dtype == torch.bfloat16
    error = (half.head(hidden).float() - model.head(model.forward(tokens))).norm()
    assert 0 < error < 0.1 * model.head(model.forward(tokens)).norm()


def test_the_oracle_stands_alone():
    """It is to be independent of what it checks: no vLLM, nothing else of this package."""
    imported = set()
    for file in Path(reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level < 2, file
                imported |= {(node.module or "").split(".")[0]} if node.level == 0 else set()
    assert imported - sys.stdlib_module_names == {"torch", "safetensors"}


def test_config_of_llada_8b():
    config = LLaDAConfig.from_dict(LLADA_8B)
    assert (config.head_dim, config.n_kv_heads, config.mask_token_id) == (128, 32, 126336)


def test_null_keys_mean_what_they_mean_in_llada():
    raw = LLADA_8B | {"n_kv_heads": None, "embedding_size": None, "mlp_hidden_size": None}
    config = LLaDAConfig.from_dict(raw | {"mlp_ratio": 4})
    assert (config.n_kv_heads, config.embedding_size) == (32, 126464)
    assert config.mlp_hidden_size == 4 * 4096


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": False}, "rope=False"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"d_model": None}, "lacks d_model"),
        ({"n_kv_heads": 5}, "5 KV heads"),
        ({"mask_token_id": 126464}, "mask_token_id"),
        ({"embedding_size": 100}, "embedding_size 100"),
        ({"n_heads": 3, "n_kv_heads": 3}, "over 3 heads"),
    ],
)
def test_a_config_that_is_another_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict(LLADA_8B | change)


def test_missing_and_misshapen_weights_are_named(llada):
    model = llada("mha")
    name = "model.transformer.blocks.3.up_proj.weight"
    without = {n: w for n, w in model.weights.items() if n != name}
    with pytest.raises(ValueError, match=r"up_proj.*nothing"):
        LLaDA(model.config, without)
    with pytest.raises(ValueError, match=r"up_proj.*\(1, 2\)"):
        LLaDA(model.config, without | {name: torch.zeros(1, 2)})
