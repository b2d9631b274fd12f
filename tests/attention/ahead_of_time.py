# SPDX-License-Identifier: Apache-2.0
"""Compiles what ``warm_up`` and two passes would launch, for a GPU that need not be there.

Prints a line of JSON for each compilation. In a process of its own: Triton decides when it is
imported whether it interprets.

Arguments: compute capability; sizes of ``paged_pass.Shape`` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import numpy as np
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from tests.attention.paged_pass import PagedPass, Plan, Shape
from vllm_elastic.attention.paged_statistics import PAPER, RELEASED, warm_up
from vllm_elastic.decoding.plan import PassKind, PassPlan
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner.candidate_kernel import most_probable_by_kernel
from vllm_elastic.runner.draws import Draws
from vllm_elastic.runner.sampling_kernel import sample_by_kernel
from vllm_elastic.runner.upload import Upload


class NoDevice:
    """What Triton asks of a driver when it compiles and does not launch."""

    def __init__(self, capability: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0
        self.get_active_torch_device = lambda: torch.device("cpu")


def compile_only(phase: list[str]) -> None:
    """Kernels are compiled when they are called, and nothing is launched."""
    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compilations = self.device_caches[0][0]
        before = len(compilations)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if len(compilations) > before:
            fields = {"phase": phase[0], "kernel": self.fn.__name__}
            fields |= {"shared": kernel.metadata.shared, "assembly": kernel.asm["ptx"]}
            print(json.dumps(fields))
        return kernel

    JITFunction.run = compiled


def passes(shape: Shape) -> None:
    """One of odd sizes, one whose sizes are multiples of 16, which Triton would set apart."""
    for length, tested in ((33, [0]), (160, list(range(16)))):
        for statistics in ((0,), (RELEASED, PAPER)):
            plans = [
                Plan(length, 31, 0, 1, statistic, tested if statistic else [], written=[2])
                for statistic in statistics
            ]
            made = PagedPass(shape, plans)
            kernels, reading = made.statistics(), made.reading(0, shape.layers)
            attention = kernels.read(reading)
            for statistic, count in reading.num_sums.items():
                if count:
                    sums = kernels.drift_sums(attention, statistic)
                    out = torch.zeros(len(plans), shape.layers)
                    kernels.similarities(reading, statistic, sums, shape.heads, out)
            kernels.add_mass(attention, torch.zeros(shape.layers, len(plans), length))
            kernels.add_mass(attention, torch.zeros(len(plans), length))


def candidates(num_rows: int, dtype: torch.dtype) -> None:
    """LLaDA-8B's vocabulary."""
    logits = torch.zeros(num_rows, 126464, dtype=dtype)
    token_ids, probabilities = most_probable_by_kernel(logits)
    window = np.arange(num_rows, dtype=np.int32)
    plan = PassPlan("", PassKind.WINDOW, 0, [], window, window, sampling=Sampling(temperature=1.0))
    upload = Upload(torch.device("cpu"))
    for first in (0, 16):  # window rows before these
        draws = Draws([plan], [slice(first, first + num_rows)], upload)
        rows = slice(first, first + num_rows)
        sample_by_kernel(logits, draws, rows, token_ids, probabilities)


if __name__ == "__main__":
    driver.set_active(NoDevice(int(sys.argv[1])))
    sizes = json.loads(sys.argv[2])
    shape = Shape(**sizes | {"dtype": getattr(torch, sizes["dtype"])})
    phase = ["warm-up"]
    compile_only(phase)
    keys = PagedPass(shape, [Plan(1, 1)]).keys
    warm_up(keys, shape.heads, shape.heads, shape.hidden_stride)
    candidates(64, shape.dtype)
    phase[0] = "pass"
    passes(shape)
    for num_rows in (1, 33):
        candidates(num_rows, shape.dtype)
