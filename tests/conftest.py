# SPDX-License-Identifier: Apache-2.0
"""What all tests share. Environment first: vLLM reads it when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Released configurations go last: freeing their engines takes the process's groups with it."""
    items.sort(key=lambda item: "test_llada_8b" in item.nodeid or "test_dream_7b" in item.nodeid)
