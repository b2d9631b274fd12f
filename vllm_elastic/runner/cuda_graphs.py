# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs in one memory pool. Knows nothing of what is captured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from vllm.logger import init_logger
from vllm.utils.gc_utils import freeze_gc_for_cudagraph_capture
from vllm.utils.torch_utils import weak_ref_tensors

from vllm_elastic.models import ranks
from vllm_elastic.runner.graphed_block import Tensors

logger = init_logger("vllm.vllm_elastic.runner.cuda_graphs")


@dataclass(slots=True)
class CudaGraph:
    """CUDA's graph of some work (``graphed_block.Graph``)."""

    outputs: Tensors
    _graph: torch.cuda.CUDAGraph

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """All share a pool: one graph's intermediates and outputs lie where another's do
    (``graphed_block.Graphs``)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._new: list[CudaGraph] = []

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
        captured = CudaGraph(outputs, graph)
        self._new.append(captured)
        return captured

    def launch_new(self) -> None:
        """Launch those that were not yet, so that what CUDA allocates for a first launch is
        there, and what it refuses ends the start."""
        for graph in self._new:
            graph.replay()
        torch.cuda.synchronize()
        self._new = []


@dataclass(slots=True)
class Taken:
    """Memory that graphs took.

    Attributes:
        by_cuda: bytes, beside what torch allocated for what is in them; once they are captured.
    """

    by_cuda: int = 0


@contextlib.contextmanager
def capturing(graphs: CudaGraphs, what: str, count: int, remedy: str) -> Iterator[Taken]:
    """Graphs are captured while it is entered; the log says how long it took and what they take.

    Args:
        graphs: capture them. what: they are of. count: numbers of rows that they are for.
        remedy: what to start with instead.

    Raises:
        RuntimeError: the device refuses.
    """
    started, taken = time.perf_counter(), Taken()
    free, reserved = free_bytes(), torch.cuda.memory_reserved()
    try:
        # What is collected inside a capture may end it: a kernel's module that is unloaded.
        with freeze_gc_for_cudagraph_capture(), ranks.capturing(graphs.device):
            yield taken
        graphs.launch_new()  # by now each rank knows where the others' parts are
    except RuntimeError as error:
        raise RuntimeError(
            f"capturing CUDA graphs of {what} failed; {remedy} (vllm_elastic)"
        ) from error
    total = free - free_bytes()
    taken.by_cuda = max(0, total - (torch.cuda.memory_reserved() - reserved))
    logger.info(
        "captured CUDA graphs of %s for %d numbers of rows in %.1f s; they take %d MiB, %d of them "
        "beside torch's",
        what,
        count,
        time.perf_counter() - started,
        total >> 20,
        taken.by_cuda >> 20,
    )


def free_bytes() -> int:
    """Free bytes on the device, once torch has given back what it keeps for later."""
    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free
