# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM's flags leave an optimisation on: CUDA graphs, compiled layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig


def leave_on(vllm_config: VllmConfig, mode: CompilationMode | CUDAGraphMode | None) -> bool:
    """Asked before vLLM fills in what the operator left open.

    Args:
        mode: the optimisation's own; None: left open, so that the level decides.
    """
    if vllm_config.model_config.enforce_eager:
        return False
    return bool(vllm_config.optimization_level > 0 if mode is None else mode.value)
