# SPDX-License-Identifier: Apache-2.0
"""A pass's numbers on their way back: one transfer, since a GPU is waited for at every one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import torch

T = TypeVar("T")


class Fetched(Generic[T]):
    """A value whose arrays are still on the device; ``get`` it after ``Download.run``."""

    def __init__(self, make: Callable[..., T], arrays: list[Callable[[], Any]]) -> None:
        self._make, self._arrays = make, arrays

    def get(self) -> T:
        return self._make(*(array() for array in self._arrays))


class Download:
    """Tensors that are wanted on the host."""

    def __init__(self) -> None:
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[npt.NDArray[Any]] = []

    def of(self, make: Callable[..., T], *tensors: torch.Tensor | None) -> Fetched[T]:
        """``make`` of the tensors as numpy arrays; None stays None."""
        return Fetched(make, [self._place(tensor) for tensor in tensors])

    def run(self) -> None:
        """Wait for the device and bring everything over; what is here already stays as it is."""
        away = [tensor for tensor in self._tensors if not tensor.is_cpu]
        fetched = iter(_fetched(away))
        self._arrays = [
            tensor.numpy() if tensor.is_cpu else next(fetched) for tensor in self._tensors
        ]

    def _place(self, tensor: torch.Tensor | None) -> Callable[[], Any]:
        if tensor is None:
            return lambda: None
        place = len(self._tensors)
        self._tensors.append(tensor)
        return lambda: self._arrays[place]


def _fetched(tensors: list[torch.Tensor]) -> list[npt.NDArray[Any]]:
    if not tensors:
        return []
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors])
    pieces = flat.cpu().split([tensor.nbytes for tensor in tensors])
    return [
        # A copy: a piece begins anywhere.
        piece.clone().view(tensor.dtype).view(tensor.shape).numpy()
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]
