# SPDX-License-Identifier: Apache-2.0
"""vLLM's workers with the elastic runner in place of theirs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from vllm import envs
from vllm.model_executor.warmup.deep_gemm_warmup import deep_gemm_warmup
from vllm.platforms import current_platform
from vllm.utils.deep_gemm import is_deep_gemm_supported
from vllm.utils.gc_utils import freeze_gc_heap
from vllm.v1.worker.worker_base import CompilationTimes
from vllm.v1.worker.workspace import lock_workspace

from vllm_elastic.runner.options import RunnerOptions
from vllm_elastic.runner.runner import ElasticRunner

if TYPE_CHECKING or not current_platform.is_cpu():
    from vllm.v1.worker.gpu_worker import Worker as _BaseWorker
else:
    from vllm.v1.worker.cpu_worker import CPUWorker as _BaseWorker


def set_environment(dtype: torch.dtype) -> None:
    """What libraries are to know before they are first used; the operator's own settings stay.

    Args:
        dtype: of the model.
    """
    # oneDNN keeps the 1,024 last matrix products that it compiled, 280 KB each, one for each
    # number of rows. Rows are filled up, to 40 numbers as far as 1,024 (models/rows.py), for four
    # products of a layer and the head's; other numbers are rarely of use again.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    if dtype == torch.float32:
        # Else Triton's attention multiplies in TF32, which is not exact.
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")


class ElasticWorker(_BaseWorker):
    """The platform's worker; only the runner and the warm-up differ."""

    def init_device(self) -> None:
        set_environment(self.vllm_config.model_config.dtype)
        super().init_device()
        # The GPU worker makes its runner by the method below; the CPU worker makes its own.
        if not isinstance(self.model_runner, ElasticRunner):
            self.model_runner: Any = self._make_model_runner()

    def _make_model_runner(self) -> Any:
        return ElasticRunner(self.vllm_config, self.device)

    def execute_dummy_batch(self) -> None:
        """Data-parallel engines share nothing, so there is nothing to keep in step."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        compiling = self.model_runner.compile_layers()
        if self.device.type != "cpu":  # there kernels come compiled
            if is_deep_gemm_supported() and envs.VLLM_DEEP_GEMM_WARMUP != "skip":
                # It compiles for numbers of rows; does nothing without weights of its kind.
                rows = self.vllm_config.scheduler_config.max_num_batched_tokens
                deep_gemm_warmup(self.model_runner.model, rows)
            self.model_runner.warm_up()
            if RunnerOptions.of_engine(self.vllm_config).graph_rows:
                # Scratch of vLLM's that grew now would leave graphs pointing at what was there.
                lock_workspace()
            freeze_gc_heap()  # as vLLM's own does: weights and graphs are looked at no more
        return CompilationTimes(language_model=compiling, encoder=0.0)
