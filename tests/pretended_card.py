# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA platform on a card that is not there, to ask it what it would choose."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
from vllm.platforms.interface import DeviceCapability


def pretended_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Any:
    """A platform of that compute capability."""
    if importlib.util.find_spec("vllm._C_stable_libtorch") is None:  # kernels, in CUDA builds only
        name = "vllm._C_stable_libtorch"
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from vllm.platforms.cuda import CudaPlatformBase

    class Card(CudaPlatformBase):
        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(*capability)

    return Card()
