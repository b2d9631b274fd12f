# SPDX-License-Identifier: Apache-2.0
"""Compiles what a pass would launch, for GPUs that need not be there; prints a line a kernel.

Run in a process of its own, since Triton reads once whether it interprets.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

CAPABILITY = int(sys.argv[1])


class NoDevice:
    """What Triton asks of a driver when it compiles and does not launch."""

    class utils:
        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": 101376, "multiprocessor_count": 1, "warpSize": 32}

    class launcher_cls:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


driver.set_active(NoDevice())
run = JITFunction.run


def compiled_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    before = len(self.device_caches[0][0]) if self.device_caches else 0
    kernel = run(self, *args, grid=grid, warmup=True, **options)
    if len(self.device_caches[0][0]) > before:
        print(
            json.dumps(
                {
                    "kernel": self.fn.__name__,
                    "shared": kernel.metadata.shared,
                    "assembly": kernel.asm["ptx"],
                }
            )
        )
    return kernel


JITFunction.run = compiled_only

if __name__ == "__main__":
    from tests.attention.paged_pass import PagedPass, Plan, Shape
    from vllm_elastic.attention.paged_kernels import PAPER, RELEASED

    sizes = json.loads(sys.argv[2])
    shape = Shape(**sizes | {"dtype": getattr(torch, sizes["dtype"])})
    for length in (33, 160):  # the second one's sizes are multiples of 16
        plans = [
            Plan(length, length // 16, 0, 1, statistic, tested=[0, 1][: length // 33], written=[2])
            for statistic in (RELEASED, PAPER)
        ]
        made = PagedPass(shape, plans)
        statistics, part = made.statistics(), made.part(0, shape.layers)
        attention = statistics.read(part)
        for statistic in (RELEASED, PAPER):
            sums = statistics.drift_sums(attention, statistic)
            statistics.similarities(part, statistic, sums, 4, torch.zeros(2, shape.layers))
        statistics.add_mass(attention, torch.zeros(shape.layers, 2, length))
        statistics.add_mass(attention, torch.zeros(2, length))
        PagedPass(shape, [Plan(length, 3)]).statistics().read(
            PagedPass(shape, [Plan(length, 3)]).part(0, 1)
        )
