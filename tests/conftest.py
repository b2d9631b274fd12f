# SPDX-License-Identifier: Apache-2.0
"""What all tests share. Environment first: vLLM reads it when it is imported."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# By itself each vLLM binds its workers to the first cores: all servers of all test processes to the
# same ones.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
