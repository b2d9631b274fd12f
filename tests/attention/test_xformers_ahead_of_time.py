# SPDX-License-Identifier: Apache-2.0
"""xformers' kernel compiled for GPUs that need not be there, as the backend calls it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from vllm_elastic.attention.xformers_backend import missing

from .test_ahead_of_time import KIB, compilations

lacking = missing()
pytestmark = pytest.mark.skipif(lacking is not None, reason=f"{lacking}; make xformers-test has it")

LLADA: dict[str, Any] = dict(heads=32, kv_heads=32, dim=128, block_size=32, dtype="bfloat16")
DREAM: dict[str, Any] = dict(heads=28, kv_heads=4, dim=128, block_size=16, dtype="float16")
WIDE: dict[str, Any] = dict(heads=8, kv_heads=8, dim=256, block_size=64, dtype="bfloat16")
# Shared memory of a block by compute capability: A100, RTX 3090, H100, RTX 5090.
GPUS = {80: 163, 86: 99, 90: 227, 120: 99}


@pytest.mark.parametrize(
    ("capability", "sizes"),
    [(80, LLADA), (86, DREAM), (90, LLADA), (120, WIDE)],
    ids=lambda value: value if isinstance(value, int) else f"head{value['dim']}-{value['dtype']}",
)
def test_kernel_compiles(capability: int, sizes: dict[str, Any]) -> None:
    """Once: small and large passes, in few and many blocks, share it."""
    (compiled,) = compilations(capability, sizes, "tests.attention.xformers_ahead_of_time")
    assert compiled["kernel"] == "_fwd_kernel_splitK"
    assert compiled["shared"] <= GPUS[capability] * KIB, "it would not fit on a multiprocessor"
    assembly = compiled["assembly"]
    assert "mma" in assembly and ".local" not in assembly
    # Keys behind the canvas's end are not loaded, and taken for zeros: they may be NaN.
    lines = [line for line in assembly.splitlines() if ".loc" not in line and "//" not in line]
    for before, line in pairwise(lines):
        if line.lstrip().startswith("@") and "ld.global" in line:
            assert before.split()[0].startswith("mov") and before.endswith("0x0;"), line
