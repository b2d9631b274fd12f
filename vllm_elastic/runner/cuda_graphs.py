# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs in one memory pool. Knows nothing of what is captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import weak_ref_tensors

from vllm_elastic.runner.graphed_block import Tensors


@dataclass(slots=True)
class CudaGraph:
    """Of one piece of work (``graphed_block.Graph``)."""

    outputs: Tensors
    _graph: torch.cuda.CUDAGraph

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """All share a pool: one graph's intermediates and outputs lie where another's do
    (``graphed_block.Graphs``)."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, work: Callable[[], Tensors]) -> CudaGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            # What is compiled, tuned or made for good at a first call is no part of a graph.
            work()
            # `torch.cuda.graph` would collect garbage each time: minutes for so many graphs.
            graph.capture_begin(pool=self._pool)
            try:
                # Weak, so that the next capture may take their memory.
                outputs: Tensors = weak_ref_tensors(work())
            finally:
                graph.capture_end()
        torch.cuda.synchronize()
        return CudaGraph(outputs, graph)


def free_bytes() -> int:
    """On the device, once torch has given back what it keeps for later."""
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free
