# SPDX-License-Identifier: Apache-2.0
"""For how many rows CUDA graphs are captured, by vLLM's own flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_elastic.engine.optimisation_flags import leave_on
from vllm_elastic.models.rows import bucket

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.graph_flags")

MOST_ROWS = 512
"""vLLM's own default. A pass of more rows computes for longer than it takes to launch."""


def most_rows(limit: int | None, row_budget: int) -> int:
    """The largest pass that a graph is captured for, where no sizes are named.

    Args:
        limit: ``--max-cudagraph-capture-size``; None: the operator left it open.
    """
    return min(MOST_ROWS if limit is None else limit, row_budget)


def graph_rows(vllm_config: VllmConfig) -> list[int]:
    """Numbers of rows, ascending; none: every pass is eager."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    wanted = leave_on(vllm_config, compilation.cudagraph_mode)
    if not current_platform.is_cuda() or not wanted:
        return []
    limit = compilation.max_cudagraph_capture_size
    sizes = compilation.cudagraph_capture_sizes
    if sizes is None:
        row_budget = vllm_config.scheduler_config.max_num_batched_tokens
        sizes = list(range(1, most_rows(limit, row_budget) + 1))
    counts = sorted({bucket(size) for size in sizes if limit is None or size <= limit})
    if counts and parallel.tensor_parallel_size > 1:
        logger.info("CUDA graphs are off: what ranks exchange in a pass was not captured yet")
        return []
    if counts and vllm_config.lora_config is not None:
        logger.info("CUDA graphs are off: which rows an adapter changes differs from pass to pass")
        return []
    return counts
