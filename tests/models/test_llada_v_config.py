# SPDX-License-Identifier: Apache-2.0
"""LLaDA-V's config.json: what is read, what is taken for granted, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny_llada_v import IMAGE, MASK, NEVER, TinyLLaDAV
from vllm_elastic.models.llada_v_config import LLaDAVConfig
from vllm_elastic.models.registry import traits_of


def test_llamas_names_and_the_traits() -> None:
    raw = TinyLLaDAV().config_json()
    config = LLaDAVConfig(**raw)
    for theirs in ("hidden_size", "num_hidden_layers", "max_position_embeddings", "rope_theta"):
        assert getattr(config, theirs) == raw[theirs]
    traits = traits_of(config)
    assert traits.never_chosen == (MASK, *NEVER)
    assert traits.image_token_id == IMAGE
    assert traits.stores_input


def test_written_and_read_again() -> None:
    """As vLLM sends a configuration from process to process, and as it is saved."""
    config = LLaDAVConfig(**TinyLLaDAV().config_json())
    again = LLaDAVConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert again.image_rules() == config.image_rules()


def test_released_model_is_the_default() -> None:
    """What the checkpoint's config.json may leave out."""
    config = LLaDAVConfig()
    assert (config.d_model, config.n_layers, config.max_sequence_length) == (4096, 32, 16384)
    assert config.image_rules().patches == 27
    assert len(config.image_rules().grids) == 36
    assert traits_of(config).never_chosen == (126336, 126081, 126080, 126346, 126347)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio='pad' .* anyres_max_N"),
        ({"image_grid_pinpoints": "6x6"}, "image_grid_pinpoints='6x6' is no list"),
        ({"image_grid_pinpoints": [[56, 57]]}, "multiple of the tower's image_size, 56"),
        ({"mm_vision_tower": "openai/clip-vit"}, "mm_vision_tower='openai/clip-vit'"),
        ({"mm_projector_type": "linear"}, "mm_projector_type='linear' .* 'mlp2x_gelu'"),
        ({"mm_hidden_size": 33}, "mm_hidden_size 33 is not the tower's width, 32"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling="),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer=-1"),
    ],
    ids=str,
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LLaDA-V config: .*{message}"):
        LLaDAVConfig(**TinyLLaDAV().config_json() | change)


def test_a_range_of_grids() -> None:
    """As LLaDA-V's scripts write it, before it is spelled out."""
    raw = TinyLLaDAV().config_json()
    spelled_out = LLaDAVConfig(**raw).image_rules()
    assert LLaDAVConfig(**raw | {"image_grid_pinpoints": "(1x1),...,(3x3)"}).image_rules() == (
        spelled_out
    )


def test_parameters_of_the_tower() -> None:
    """`bench plan` counts what the checkpoint holds, but for the norm that is not used."""
    tiny = TinyLLaDAV()
    expected = sum(weight.numel() for weight in tiny.projector.values()) + tiny.newline.numel()
    for name, weight in tiny.tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        if not name.startswith(("head.", "post_layernorm.", "encoder.layers.2.")):
            expected += weight.numel()
    assert LLaDAVConfig(**tiny.config_json()).image_parameters == expected
