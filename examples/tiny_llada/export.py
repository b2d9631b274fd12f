"""Writes a checkpoint folder that Hugging Face tools and the engine can load."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizer as tokenizers
from model import Shape, config_dict
from safetensors.torch import save_file
from torch import Tensor


def export(folder: Path, shape: Shape, weights: dict[str, Tensor]) -> None:
    """Replace `folder` by a LLaDA with these weights."""
    tokens = tokenizers.build()
    config = config_dict(shape, tokens.mask_token_id, tokens.eos_token_id)
    ends = {"eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    generation = {"bos_token_id": tokens.bos_token_id, **ends}
    replace(folder, tokenizers.save, config, generation, weights)


def replace(
    folder: Path,
    save_tokenizer: Callable[[Path], None],
    config: dict[str, Any],
    generation: dict[str, Any],
    weights: dict[str, Tensor],
) -> None:
    """Replace `folder` by a complete checkpoint, as one rename.

    Args:
        save_tokenizer: writes the tokenizer's files into a folder.
        config, generation: what `config.json` and `generation_config.json` say.
        weights: by their published names.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".export-", dir=folder.parent))
    scratch.chmod(0o755)
    save_tokenizer(scratch)
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (scratch / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    contiguous = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(contiguous, scratch / "model.safetensors", metadata={"format": "pt"})
    for file in scratch.iterdir():
        file.chmod(0o644)
    retired = folder.with_name(f".{folder.name}-retired")
    if folder.exists():
        folder.rename(retired)
    scratch.rename(folder)
    shutil.rmtree(retired, ignore_errors=True)
