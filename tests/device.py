# SPDX-License-Identifier: Apache-2.0
"""The device that is tested: a card where there is one, else the CPU.

With ``ON_SECOND_DEVICE`` set it is a device that only says it is none of the CPU's.
"""

from __future__ import annotations

import os
import sys

import torch

ON_SECOND = bool(os.environ.get("ON_SECOND_DEVICE"))

if ON_SECOND:
    from tests.second_device import SECOND as DEVICE
else:
    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

ON_CARD = DEVICE.type == "cuda"

SIMULATED = "tests.simulated_card" in sys.modules
"""Whether the card is a simulated one, which bears what would end a card's process."""

NUM_CARDS = torch.cuda.device_count() if ON_CARD else 0


def multiplies_by_4_bits() -> bool:
    """vLLM's CPU build does where there is AVX-512."""
    from vllm import _custom_ops  # noqa: F401, loads them

    return ON_CARD or hasattr(torch.ops._C, "cpu_gemm_wna16")
