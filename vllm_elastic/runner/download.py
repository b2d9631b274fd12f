# SPDX-License-Identifier: Apache-2.0
"""A pass's numbers on their way back: one transfer, since a GPU is waited for at every one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.runner.number_types import NUMPY_OF

T = TypeVar("T")

_Form = tuple[type[np.generic], torch.Size, int]
"""Type, shape, bytes."""


class Fetched(Generic[T]):
    """A value on its way; ``get``, after ``Download.send``, waits for it."""

    def __init__(self, make: Callable[..., T], arrays: list[Callable[[], Any]]) -> None:
        self._make, self._arrays = make, arrays

    def get(self) -> T:
        return self._make(*(array() for array in self._arrays))


class Download:
    """Tensors that are wanted on the host.

    What they are brought over in is this download's own, so any number may be under way.
    """

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[npt.NDArray[Any]] = []
        self._arrive: Callable[[], list[npt.NDArray[Any]]] | None = None

    def of(self, make: Callable[..., T], *tensors: torch.Tensor | None) -> Fetched[T]:
        """``make`` of the tensors as numpy arrays; None stays None."""
        return Fetched(make, [self._place(tensor) for tensor in tensors])

    def send(self) -> None:
        """Queue the transfer behind what makes the tensors. The host waits for nothing.

        What is on the host already stays as it is.
        """
        tensors, self._tensors = self._tensors, []
        away = [tensor for tensor in tensors if not self._is_here(tensor)]
        forms: list[_Form] = [
            (NUMPY_OF[tensor.dtype], tensor.shape, tensor.nbytes) for tensor in away
        ]
        nothing = torch.empty(0, dtype=torch.uint8, device="cpu")
        host, copied = _sent(away) if away else (nothing, None)

        def arrive() -> list[npt.NDArray[Any]]:
            if copied is not None:
                copied.synchronize()
            fetched = _arrays_in(host, forms)
            return [t.numpy() if self._is_here(t) else next(fetched) for t in tensors]

        self._arrive = arrive

    def _is_here(self, tensor: torch.Tensor) -> bool:
        return tensor.is_cpu

    def _place(self, tensor: torch.Tensor | None) -> Callable[[], Any]:
        if tensor is None:
            return lambda: None
        place = len(self._tensors)
        self._tensors.append(tensor)
        return lambda: self._array(place)

    def _array(self, place: int) -> npt.NDArray[Any]:
        if self._arrive is not None:
            self._arrays, self._arrive = self._arrive(), None
        return self._arrays[place]


def _arrays_in(host: torch.Tensor, forms: list[_Form]) -> Iterator[npt.NDArray[Any]]:
    """The arrays that lie one behind the other. By numpy: in torch it takes twice as long."""
    raw, start = host.numpy(), 0
    for dtype, shape, num_bytes in forms:
        # A copy: an array begins anywhere.
        yield raw[start : start + num_bytes].copy().view(dtype).reshape(shape)
        start += num_bytes


def _sent(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """Their bytes on the host once the event has come (None: at once)."""
    flat = torch.cat([_as_bytes(tensor.contiguous()) for tensor in tensors])
    host = torch.empty(flat.shape, dtype=torch.uint8, device="cpu", pin_memory=flat.is_cuda)
    host.copy_(flat, non_blocking=True)
    copied = torch.cuda.Event() if flat.is_cuda else None
    if copied is not None:
        copied.record()
    return host, copied


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view, [bytes]. A single number may keep any stride, and is contiguous all the same."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
