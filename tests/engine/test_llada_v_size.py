# SPDX-License-Identifier: Apache-2.0
"""LLaDA-V's sizes, two of its 32 layers and all of its tower, dummy weights in bfloat16: 4 GB.

config.json as the authors' training code writes it; the released file was not seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_llada_v import picture

from .full_width import full_width

pytestmark = [pytest.mark.engine, pytest.mark.long]

LAYERS = 2
CONFIG: dict[str, Any] = {
    "add_faster_video": False,
    "architectures": ["LlavaLLaDAModelLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 126081,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "image_aspect_ratio": "anyres_max_4",
    "image_grid_pinpoints": [[384 * w, 384 * h] for w in range(1, 7) for h in range(1, 7)],
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 16384,
    "mm_hidden_size": 1152,
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_spatial_pool_stride": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "model/siglip2-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "model_type": "llava_llada",
    "num_attention_heads": 32,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "tokenizer_model_max_length": 16384,
    "tokenizer_padding_side": "right",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": False,
    "use_mm_proj": True,
    "vocab_size": 126464,
}


def test_released_sizes_run(tmp_path: Path) -> None:
    with full_width(
        tmp_path, CONFIG, max_model_len=2048, kv_cache_memory_bytes=128 << 20
    ) as engine:
        model = engine.runner.model
        assert len(model.images.vision_tower.vision_model.encoder.layers) == 26
        (result,) = engine.run(
            [
                {
                    "prompt_token_ids": [126080, 126084, 198],
                    "multi_modal_data": {"image": picture(336, 336)},
                    "max_tokens": 9,
                }
            ]
        )
        assert result["prompt_tokens"] == 2 + 1485
        assert 0 < len(result["token_ids"]) <= 9
        assert not set(result["token_ids"]) & set(engine.runner.traits.never_chosen)
