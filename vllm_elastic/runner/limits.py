# SPDX-License-Identifier: Apache-2.0
"""The limits of a step, of what vLLM was told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_elastic.config import elastic_config_of
from vllm_elastic.decoding.limits import StepLimits

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def limits_of(vllm_config: VllmConfig) -> StepLimits:
    """What the requests of one step of this engine may take together."""
    elastic = elastic_config_of(vllm_config)
    scheduler = vllm_config.scheduler_config
    return StepLimits.of(
        scheduler.max_num_batched_tokens,
        scheduler.max_num_seqs,
        elastic.window,
        elastic.max_window,
        vllm_config.model_config.max_model_len,
    )
