# SPDX-License-Identifier: Apache-2.0
"""A config.json of any served family, without vLLM: what sizes are read from."""

from __future__ import annotations

import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.models.registry import FAMILIES

SIZES = (
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
    *("intermediate_size", "embedding_size"),
)


def read_config(path: Path) -> Any:
    """The family's configuration, a transformers ``PretrainedConfig``.

    Args:
        path: a checkpoint's directory, or its config.json.

    Raises:
        FileNotFoundError: there is none.
        ValueError: of no family that is served, or a key that is missing or not understood.
    """
    if path.is_dir():
        path /= "config.json"
    try:
        raw = json.loads(path.read_text())
        named = list(raw.get("architectures") or ())
        family = next((FAMILIES[name] for name in named if name in FAMILIES), None)
        if family is None:
            raise ValueError(
                f"its architectures are {named}, and those that are served are "
                f"{', '.join(FAMILIES)}"
            )
        config = resolve_name(family.config)(**raw)
        _check_sizes(config)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} cannot be read as a model's: {error}") from None
    return config


def shape_of(path: Path, bytes_per_number: int = 2) -> ModelShape:
    """The sizes in a config.json, for a command that ends where they cannot be had.

    Raises:
        FileNotFoundError: as ``read_config``.
        SystemExit: where that finds a bad value.
    """
    try:
        return ModelShape.of(read_config(path), bytes_per_number)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def _check_sizes(config: Any) -> None:
    names = {size: config.attribute_map.get(size, size) for size in SIZES}  # as the file has them
    for key in SIZES:
        if not isinstance(size := getattr(config, key), int) or size < 1:
            raise ValueError(f"{names[key]} must be a whole number from 1, got {size!r}")
    width, heads = config.hidden_size, config.num_attention_heads
    if width % heads:
        raise ValueError(
            f"{names['hidden_size']} {width} is no multiple of "
            f"{names['num_attention_heads']} {heads}"
        )
