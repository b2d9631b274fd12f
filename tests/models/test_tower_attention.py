# SPDX-License-Identifier: Apache-2.0
"""Which attention vLLM gives the image tower, where: what docs/images.md says."""

from __future__ import annotations

import pytest
import torch
from vllm.platforms.cpu import CpuPlatform

from tests.pretended_card import pretended_card

HEAD_SIZE = 72  # SigLIP's so400m


@pytest.mark.parametrize(
    ("card", "dtype", "attention"),
    [
        ((8, 0), torch.bfloat16, "FLASH_ATTN"),
        ((9, 0), torch.float16, "FLASH_ATTN"),
        ((9, 0), torch.float32, "TRITON_ATTN"),
        ((7, 5), torch.float16, "TORCH_SDPA"),
    ],
    ids=str,
)
def test_on_a_gpu(
    card: tuple[int, int], dtype: torch.dtype, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = pretended_card(monkeypatch, card)
    assert platform.get_vit_attn_backend(HEAD_SIZE, dtype).name == attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_a_cpu(dtype: torch.dtype) -> None:
    assert CpuPlatform.get_vit_attn_backend(HEAD_SIZE, dtype).name == "TORCH_SDPA"
