# SPDX-License-Identifier: Apache-2.0
"""Whether layers are compiled, by vLLM's own flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.config import CompilationMode
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_elastic.models.registry import FAMILIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.compile_flags")


def compiles(vllm_config: VllmConfig) -> bool:
    """On CPUs, unless flags say otherwise; on a GPU graphs do what it would.

    Asked before vLLM fills in what the operator left open.
    """
    model, mode = vllm_config.model_config, vllm_config.compilation_config.mode
    if mode is None:
        wanted = vllm_config.optimization_level > 0
    else:
        wanted = mode != CompilationMode.NONE
    if not current_platform.is_cpu() or model.enforce_eager or not wanted:
        return False
    off = {
        "what ranks exchange in a layer was not compiled yet": (
            vllm_config.parallel_config.tensor_parallel_size > 1
        ),
        "which rows an adapter changes differs from pass to pass": (
            vllm_config.lora_config is not None
        ),
        f"a {model.architecture}'s layers are not alike to a compiler": (
            not FAMILIES[model.architecture].compiles
        ),
    }
    for reason, holds in off.items():
        if holds:
            logger.info("layers are not compiled: %s", reason)
            return False
    return True
