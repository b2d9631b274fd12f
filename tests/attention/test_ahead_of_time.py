# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for GPUs that need not be there: what the interpreter cannot see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

KIB = 1024
GPUS = {
    # LLaDA-8B's heads on an H100.
    "h100-bf16": (90, 227 * KIB, dict(heads=32, kv_heads=32, dim=128, dtype="bfloat16")),
    # Dream's grouped heads, as served and in float32, on a card with little shared memory.
    "ada-bf16-gqa": (89, 99 * KIB, dict(heads=28, kv_heads=4, dim=128, dtype="bfloat16")),
    "ada-f32-gqa": (89, 99 * KIB, dict(heads=28, kv_heads=4, dim=128, dtype="float32")),
}


def compilations(
    capability: int, sizes: dict[str, Any], module: str = "tests.attention.ahead_of_time"
) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", module, str(capability)]
    ran = subprocess.run(
        [*command, json.dumps(sizes)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "gpu",
    [
        "h100-bf16",
        pytest.param("ada-bf16-gqa", marks=pytest.mark.long),
        pytest.param("ada-f32-gqa", marks=pytest.mark.long),
    ],
)
@pytest.mark.slow
def test_kernels_compile(gpu: str) -> None:
    capability, shared_memory, sizes = GPUS[gpu]
    compiled = compilations(capability, sizes | {"layers": 2})
    later = [each["kernel"] for each in compiled if each["phase"] == "pass"]
    assert not later, "a request would wait for a compilation"
    assert Counter(each["kernel"] for each in compiled) == {
        "mass_kernel": 2,  # with tests and without
        "released_kernel": 1,
        "paper_kernel": 1,
        "similarity_kernel": 2,  # one for each statistic
        "fold_kernel": 2,  # by layer, and over layers
        "most_probable_kernel": 1,
        "sampling_kernel": 1,
    }
    for each in compiled:
        name, assembly = each["kernel"], each["assembly"]
        assert each["shared"] <= shared_memory, f"{name} would not fit on a multiprocessor"
        assert "tf32" not in assembly, f"{name} rounds float32"
        assert ".local" not in assembly, f"{name} spills registers"
        if name == "most_probable_kernel":
            assert "cp.async" in assembly, "every load is waited for"
        if name in ("mass_kernel", "released_kernel", "paper_kernel"):
            # 16 bytes a thread: a key would else be loaded number by number.
            assert "cp.async.cg.shared.global" in assembly, name
            assert ("mma" in assembly) == (sizes["dtype"] != "float32"), name
