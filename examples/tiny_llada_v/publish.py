# SPDX-License-Identifier: Apache-2.0
"""Writes a checkpoint folder with LLaDA-V's weight names and config."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vocabulary
from safetensors.torch import save_file
from seeing import TowerShape, published_name
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
import tokenizer as text
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
    """Replace `folder` by a complete checkpoint with these weights, as one rename."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".publish-", dir=folder.parent))
    scratch.chmod(0o755)
    vocabulary.save(scratch)
    (scratch / "config.json").write_text(json.dumps(config_dict(shape, tower), indent=2) + "\n")
    ids = vocabulary.vocabulary()
    ends = {"eos_token_id": ids[text.EOS], "pad_token_id": ids[text.EOS]}
    generation = {"bos_token_id": ids[text.START], **ends, "temperature": 0.0}
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    named = {published_name(name): weight.contiguous() for name, weight in weights.items()}
    save_file(named, scratch / "model.safetensors", metadata={"format": "pt"})
    for file in scratch.iterdir():
        file.chmod(0o644)
    retired = folder.with_name(f".{folder.name}-retired")
    if folder.exists():
        folder.rename(retired)
    scratch.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
