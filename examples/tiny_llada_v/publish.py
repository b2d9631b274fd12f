# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder with LLaDA-V's weight names and config."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vocabulary
from seeing import TowerShape, published_name
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
import tokenizer as text
from export import replace
from model import Shape


def config_dict(shape: Shape, tower: TowerShape) -> dict[str, Any]:
    """`config.json` with LLaDA-V's keys; pictures are one tile."""
    ids = vocabulary.vocabulary()
    return {
        "architectures": ["LlavaLLaDAModelLM"],
        "model_type": "llava_llada",
        "hidden_size": shape.d_model,
        "intermediate_size": shape.mlp_hidden_size,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_heads,
        "max_position_embeddings": shape.max_sequence_length,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": shape.vocab_size,
        "embedding_size": shape.embedding_size,
        "bos_token_id": ids[text.START],
        "eos_token_id": ids[text.EOS],
        "pad_token_id": ids[text.EOS],
        "mask_token_id": ids[text.MASK],
        "torch_dtype": "bfloat16",
        "mm_vision_tower": "siglip2-tiny",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": tower.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "spatial_unpad",
        "image_aspect_ratio": "anyres_max_4",
        "image_grid_pinpoints": [[tower.image_size, tower.image_size]],
        "vision_config": asdict(tower) | {"hidden_act": "gelu_pytorch_tanh"},
        "image_token_id": ids[vocabulary.IMAGE],
        "never_chosen_ids": [ids[token] for token in vocabulary.NEVER_CHOSEN],
    }


def publish(folder: Path, shape: Shape, tower: TowerShape, weights: dict[str, Tensor]) -> None:
    """Replace `folder` by a LLaDA-V with these weights."""
    ids = vocabulary.vocabulary()
    ends = {"eos_token_id": ids[text.EOS], "pad_token_id": ids[text.EOS]}
    generation = {"bos_token_id": ids[text.START], **ends}
    named = {published_name(name): weight for name, weight in weights.items()}
    replace(folder, vocabulary.save, config_dict(shape, tower), generation, named)
