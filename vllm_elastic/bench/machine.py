# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Device, driver, versions and threads of this process."""
    import torch
    import vllm

    found: dict[str, Any] = {"device": _processor(), "driver": None}
    if torch.cuda.is_available():
        from vllm.third_party import pynvml

        pynvml.nvmlInit()
        found["device"] = torch.cuda.get_device_name()
        found["driver"] = pynvml.nvmlSystemGetDriverVersion()
    return found | {
        "torch": torch.__version__,
        "vllm": vllm.__version__,
        "threads": torch.get_num_threads(),
    }


def sentence(found: dict[str, Any]) -> str:
    """What ``machine`` found, in a line."""
    driver = f", driver {found['driver']}" if found["driver"] else ""
    versions = f"torch {found['torch']}, vLLM {found['vllm']}"
    return f"{found['device']}{driver}, {versions}, {found['threads']} thread(s)"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
