# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs' twin on a CPU: a tape of the operators that work ran, on the tensors they ran on.

As in a graph, Python runs once: what it read or decided then holds for every replay. As in a
graphs' pool, what one graph made is lost when the next is replayed: here it becomes NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAN = float("nan")

Tensors = tuple[torch.Tensor, ...]


@dataclass
class Call:
    """One operator.

    Attributes:
        made: of what it returned, the tensors in memory of their own; None for all else.
    """

    operator: Any
    args: Any
    kwargs: Any
    made: list[torch.Tensor | None]

    def again(self) -> None:
        found = _results(self.operator(*self.args, **self.kwargs))
        for tensor, new in zip(self.made, found, strict=True):
            if tensor is not None:
                tensor.copy_(new)
        if "empty" in self.operator.overloadpacket.__name__:
            _poison(self.made)


class Tape(TorchDispatchMode):
    """Records what is called while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = {_storage(each) for each in pytree.tree_leaves((args, kwargs)) if _is_tensor(each)}
        made: list[torch.Tensor | None] = []
        for each in _results(result):
            assert each is None or _is_tensor(each), f"{func}: a number for the host in a graph"
            fresh = each is not None and _storage(each) not in given
            made.append(each if fresh else None)
        self.calls.append(Call(func, args, kwargs, made))
        return result


class RecordedGraph:
    def __init__(self, outputs: Tensors, calls: list[Call], owner: RecordedGraphs) -> None:
        self.outputs = outputs
        self._calls, self._owner = calls, owner

    def replay(self) -> None:
        self._owner.take_memory(self)
        for call in self._calls:
            call.again()

    def poison(self) -> None:
        for call in self._calls:
            _poison(call.made)


class RecordedGraphs:
    """Records instead of capturing (``runner.cuda_graphs.CudaGraphs``)."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self._last: RecordedGraph | None = None
        self._new: list[RecordedGraph] = []

    def capture(self, work: Callable[[], Tensors]) -> RecordedGraph:
        with Tape() as tape:
            outputs = work()
        graph = RecordedGraph(outputs, tape.calls, self)
        graph.poison()
        self._new.append(graph)
        return graph

    def launch_new(self) -> None:
        for graph in self._new:
            graph.replay()
        self._new = []

    def take_memory(self, graph: RecordedGraph) -> None:
        if self._last is not None:
            self._last.poison()
        self._last = graph


def _results(returned: Any) -> list[Any]:
    """Without what a sum over ranks returns beside them (gloo's): it is waited for."""
    leaves = pytree.tree_leaves(returned)
    for each in leaves:
        if isinstance(each, torch.ScriptObject):
            each.wait()
    return [each for each in leaves if not isinstance(each, torch.ScriptObject)]


def _poison(made: list[torch.Tensor | None]) -> None:
    for tensor in made:
        if tensor is not None and tensor.is_floating_point():
            tensor.fill_(NAN)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
