# SPDX-License-Identifier: Apache-2.0
"""Dream's config.json: what is read of it, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.qwen2_oracle import DREAM
from vllm_elastic.models.dream_config import DreamConfig

SIZES = {
    **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
    **{"mask_token_id": 151666, "eos_token_id": 151643, "tie_word_embeddings": False},
    **{"logits_shift": 1, "sliding_window": None},
}


def test_released_file_is_read_whole(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.register("Dream", DreamConfig, exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(DREAM))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DreamConfig
    assert {key: getattr(config, key) for key in SIZES} == SIZES
    config.save_pretrained(tmp_path)  # transformers 5 writes what it has read in its own way
    again = AutoConfig.from_pretrained(tmp_path)
    assert {key: getattr(again, key) for key in SIZES} == SIZES


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_token_id": None},
        {"eos_token_id": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"sliding_window": 4096},  # not used
        {"layer_types": ["full_attention"] * 28},
        {"head_dim": 128},
        {"num_hidden_layers": 28, "a_key_of_tomorrow": 3},
    ],
)
def test_the_same_said_otherwise(changes: dict[str, Any]) -> None:
    """The mask's id is Dream's own where the file has none."""
    config = DreamConfig(**DREAM | changes)
    assert {key: getattr(config, key) for key in SIZES} == SIZES


def test_dream_coder() -> None:
    """Other ends and lengths are those of its file."""
    config = DreamConfig(**DREAM | {"bos_token_id": 151665, "max_position_embeddings": 32768})
    assert (config.bos_token_id, config.max_position_embeddings) == (151665, 32768)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"use_mrope": True}, "use_mrope=True"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling scales"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters scales"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "rope_scaling scales"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 'sliding_attention'"),
        ({"head_dim": 64}, "head_dim=64"),
        ({"num_attention_heads": 27}, "num_attention_heads 27 must divide"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"vocab_size": 151666}, "mask_token_id 151666 is beyond vocab_size 151666"),
        ({"rope_theta": None}, "rope_theta must be given"),
        ({"rms_norm_eps": None}, "rms_norm_eps must be given"),
        ({"hidden_size": None, "vocab_size": None}, "vocab_size, hidden_size must be given"),
    ],
)
def test_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DreamConfig(**DREAM | changes)
