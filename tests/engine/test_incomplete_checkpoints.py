# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that lacks a tensor ends the start; vLLM's own check passes over linear layers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vllm_elastic.bench.engine import BenchEngine

from .conftest import Served

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("gqa-tied", "blocks.1.k_proj.weight"),
        ("dream", "layers.0.self_attn.v_proj.bias"),
        ("dream", "layers.3.mlp.down_proj.weight"),
    ],
)
def test_what_is_missing_is_named(
    family: str, left_out: str, serve: Callable[[str], Served], tmp_path: Path
) -> None:
    whole = serve(family).directory
    shutil.copytree(whole, tmp_path / "part")
    (file,) = (tmp_path / "part").glob("*.safetensors")
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith(left_out))
    del weights[name]
    save_file(weights, file)
    with pytest.raises(ValueError, match="the checkpoint has nothing for 1 of"):
        BenchEngine(tmp_path / "part", max_model_len=64, kv_cache_memory_bytes=8 << 20)
