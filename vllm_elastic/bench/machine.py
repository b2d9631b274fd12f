# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Device, driver, versions and threads of this process."""
    import torch

    found: dict[str, Any] = {"device": _processor(), "driver": None}
    if torch.cuda.is_available():
        found["device"], found["driver"] = torch.cuda.get_device_name(), _driver()
    return found | {
        "torch": torch.__version__,
        "vllm": metadata.version("vllm"),
        "threads": torch.get_num_threads(),
    }


def sentence(found: dict[str, Any]) -> str:
    """What ``machine`` found, in a line."""
    driver = f", driver {found['driver']}" if found["driver"] else ""
    versions = f"torch {found['torch']}, vLLM {found['vllm']}"
    return f"{found['device']}{driver}, {versions}, {found['threads']} thread(s)"


def _driver() -> str | None:
    """The driver of the first card; torch does not know it."""
    ask = ["nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
