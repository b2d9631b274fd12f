# SPDX-License-Identifier: Apache-2.0
"""Whether layers are compiled, by vLLM's own flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_elastic.engine.optimisation_flags import leave_on
from vllm_elastic.models.registry import FAMILIES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.compile_flags")


def compiles(vllm_config: VllmConfig) -> bool:
    """On CPUs, unless flags say otherwise; on a GPU graphs do what it would."""
    model = vllm_config.model_config
    wanted = leave_on(vllm_config, vllm_config.compilation_config.mode)
    if not current_platform.is_cpu() or not wanted:
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
