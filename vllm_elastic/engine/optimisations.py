# SPDX-License-Identifier: Apache-2.0
"""What of compiled layers and CUDA graphs is on, by vLLM's own flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_elastic.models.registry import FAMILIES
from vllm_elastic.models.rows import bucket
from vllm_elastic.runner.options import RunnerOptions

if TYPE_CHECKING:
    from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.optimisations")

MOST_ROWS = 512
"""vLLM's own default. A pass of more rows computes for longer than it takes to launch."""

MOST_ROWS_OF_A_WHOLE_PASS = 256
"""A pass of more computes for longer than its weights are read, of LLaDA-8B on an H100."""


def runner_options(vllm_config: VllmConfig) -> RunnerOptions:
    """What the runner is to do; asked before vLLM fills in what the operator left open."""
    counts = graph_rows(vllm_config)
    return RunnerOptions(counts, whole_pass_rows(vllm_config, counts), compiles(vllm_config))


def compiles(vllm_config: VllmConfig) -> bool:
    """Whether layers are compiled: on CPUs, unless flags say otherwise; on a GPU graphs do what it
    would."""
    model = vllm_config.model_config
    wanted = _leave_on(vllm_config, vllm_config.compilation_config.mode)
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


def most_rows(limit: int | None, row_budget: int) -> int:
    """The largest pass that a graph is captured for, where no sizes are named.

    Args:
        limit: ``--max-cudagraph-capture-size``; None: the operator left it open.
    """
    return min(MOST_ROWS if limit is None else limit, row_budget)


def graph_rows(vllm_config: VllmConfig) -> list[int]:
    """Numbers of rows that graphs of layers are captured for, ascending; none: all is eager."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    wanted = _leave_on(vllm_config, compilation.cudagraph_mode)
    if not current_platform.is_cuda() or not wanted:
        return []
    limit = compilation.max_cudagraph_capture_size
    sizes = compilation.cudagraph_capture_sizes
    if sizes is None:
        row_budget = vllm_config.scheduler_config.max_num_batched_tokens
        sizes = list(range(1, most_rows(limit, row_budget) + 1))
    counts = sorted({bucket(size) for size in sizes if limit is None or size <= limit})
    if counts and parallel.tensor_parallel_size > 1 and compilation.cudagraph_mode is None:
        logger.info(
            "CUDA graphs are off: no two cards have tried them with several ranks; "
            '--compilation-config \'{"cudagraph_mode": "PIECEWISE"}\' captures them'
        )
        return []
    if counts and vllm_config.lora_config is not None:
        logger.info("CUDA graphs are off: which rows an adapter changes differs from pass to pass")
        return []
    return counts


def whole_pass_rows(vllm_config: VllmConfig, counts: list[int]) -> list[int]:
    """Numbers of rows for which a whole pass is captured, attention in it; none: each layer's
    parts are, and no more.

    Only where the operator names a mode of vLLM's that has attention in graphs: no card ran it yet.

    Args:
        counts: numbers of rows that layers' graphs are captured for.
    """
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is None or not mode.has_full_cudagraphs():
        return []
    return [count for count in counts if count <= MOST_ROWS_OF_A_WHOLE_PASS]


def _leave_on(vllm_config: VllmConfig, mode: CompilationMode | CUDAGraphMode | None) -> bool:
    """Whether an optimisation is on.

    Args:
        mode: the optimisation's own; None: left open, so that the level decides.
    """
    if vllm_config.model_config.enforce_eager:
        return False
    return bool(vllm_config.optimization_level > 0 if mode is None else mode.value)
