# SPDX-License-Identifier: Apache-2.0
"""What all tests share. Environment first: vLLM reads it when it is imported."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# By itself each vLLM binds its workers to the first cores: all servers of all test processes to the
# same ones.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Asked by the driver's library, CUDA need not be started here, and workers may be forked.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from tests.device import ON_CARD, ON_SECOND

if not ON_CARD:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)  # a card's machine has no pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from tests.one_server import OneServer

    return OneServer(config, log) if config.getoption("dist") == "loadfile" else None


@pytest.fixture(scope="session", autouse=True)
def _second_device() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if ON_SECOND:
            from tests.second_device import second_device

            stack.enter_context(second_device())
        yield
