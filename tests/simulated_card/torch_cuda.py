# SPDX-License-Identifier: Apache-2.0
"""What torch.cuda is asked for, answered for a card that is not there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # before CUDA seems to be there: it would look for all of it
import torch._inductor.standalone_compile  # likewise
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from tests.recorded_graphs import Call, RecordedGraph, RecordedGraphs, Tape
from tests.second_device import OnSecond, kept, second_device

CARD = torch.device("cuda", 0)
CAPABILITY = (9, 0)
MEMORY = 8 << 30
"""Bytes of the card, which are the host's."""

LAUNCH = 1 << 11
"""Bytes that CUDA is said to keep of a launch in a graph."""


class Event:
    """Work is over as soon as it is queued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None:
        self._recorded = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end._recorded - self._recorded)

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Stream:
    """Likewise."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None: ...


class Generator(torch.Generator):
    """Of the host, for the card too."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        generator: Generator = super().__new__(cls, device="cpu")
        return generator


class Memory:
    """What tensors of the card hold; torch keeps nothing beside it.

    Attributes:
        of_graphs: bytes that CUDA keeps of them.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, int] = {}
        self.held = self.peak = self.of_graphs = 0

    def add_graph(self, graph: CUDAGraph, num_launches: int) -> None:
        self.of_graphs += num_launches * LAUNCH
        weakref.finalize(graph, self._take_graph, num_launches)

    def _take_graph(self, num_launches: int) -> None:
        self.of_graphs -= num_launches * LAUNCH

    def add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += self._sizes[key]
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._take, key)

    def _take(self, key: int) -> None:
        self.held -= self._sizes.pop(key)

    def free(self, device: Any = None) -> tuple[int, int]:
        return MEMORY - self.held - self.of_graphs, MEMORY

    def reset_peak(self, device: Any = None) -> None:
        self.peak = self.held

    def stats(self, device: Any = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.peak": self.peak,
            "allocated_bytes.all.current": self.held,
        }


@dataclass
class Launch:
    """A kernel's, as a tape has it."""

    call: Callable[[], Any]
    made: tuple[()] = ()

    def again(self) -> None:
        self.call()


class CUDAGraph:
    """A tape of the operators and kernels that were called while it was captured."""

    capturing: Tape | None = None
    memory: Memory

    def capture_begin(self, pool: RecordedGraphs, **kwargs: Any) -> None:
        assert CUDAGraph.capturing is None, "another graph is being captured"
        self._pool, self._tape = pool, Tape()
        CUDAGraph.capturing = self._tape.__enter__()

    def capture_end(self) -> None:
        self._tape.__exit__(None, None, None)
        CUDAGraph.capturing = None
        calls = [_in_memory(call) for call in self._tape.calls]
        self._graph = RecordedGraph((), calls, self._pool)
        self._graph.poison()
        self.memory.add_graph(self, len(calls))

    def replay(self) -> None:
        with _unseen():
            self._graph.replay()


def launched(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A function over the card's memory that torch does not see, nor anything that it calls."""

    def launch(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(kept, (args, kwargs))

        def call() -> Any:
            with _unseen():
                return kernel(*args, **kwargs)

        if CUDAGraph.capturing is not None:
            CUDAGraph.capturing.calls.append(Launch(call))
        return call()

    return launch


def _in_memory(call: Call | Launch) -> Call | Launch:
    """A replay calls no operators on the card's tensors: it has their memory."""
    if isinstance(call, Launch):
        return call
    args, kwargs, made = pytree.tree_map(kept, (call.args, call.kwargs, call.made))
    return Call(call.operator, args, kwargs, made)


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """By torch's modes: what a card does, the host does not call."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def install() -> None:
    """For good: torch has a card from now on, and this thread may make tensors there."""
    OnSecond.place = CARD
    memory = Memory()
    OnSecond.made = memory.add
    CUDAGraph.memory = memory
    ctypes.CDLL(str(_guard()))
    of_both: dict[str, Any] = {
        "device_count": lambda: 1,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "memory_reserved": lambda device=None: memory.held,
        "memory_allocated": lambda device=None: memory.held,
        "max_memory_allocated": lambda device=None: memory.peak,
        "reset_peak_memory_stats": memory.reset_peak,
    }
    of_cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "_is_compiled": lambda: True,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": memory.free,
        "manual_seed_all": lambda seed: None,
        "set_sync_debug_mode": lambda mode: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: Stream(),
        "graph_pool_handle": RecordedGraphs,
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": CUDAGraph,
    }
    of_accelerator: dict[str, Any] = {
        "current_device_index": lambda: 0,
        "set_device_index": lambda device: None,
        "empty_host_cache": lambda: None,
        "get_memory_info": memory.free,
        "memory_stats": memory.stats,
    }
    for module, own in ((torch.cuda, of_cuda), (torch.accelerator, of_accelerator)):
        for name, answer in (of_both | own).items():
            setattr(module, name, answer)
    torch.cuda.memory.get_allocator_backend = lambda: "simulated"
    torch.Generator = Generator
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    _for_good.enter_context(second_device())


_for_good = contextlib.ExitStack()

PROPERTIES = SimpleNamespace(
    name="a simulated card",
    total_memory=MEMORY,
    multi_processor_count=132,
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    is_integrated=False,
)


def _guard() -> Path:
    """Compiled where it is not yet, for this release of torch."""
    source, root = Path(__file__).with_name("guard.cpp"), Path(torch.__file__).parent
    built = source.parents[2] / "out" / f"cuda_guard-{torch.__version__}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        making = built.with_suffix(f".{os.getpid()}")  # by several processes at once
        flags = ["-std=c++20", "-O1", "-DNDEBUG", "-shared", "-fPIC", f"-I{root / 'include'}"]
        libraries = [f"-L{root / 'lib'}", "-lc10"]
        subprocess.run(["g++", *flags, str(source), "-o", str(making), *libraries], check=True)
        making.rename(built)
    return built
