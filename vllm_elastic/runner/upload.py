# SPDX-License-Identifier: Apache-2.0
"""A pass's numbers on their way to the device: packed into one buffer, copied once."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from vllm_elastic.runner.number_types import TORCH_OF

_ALIGNMENT = 16
"""Bytes: no array of numbers starts inside another one's word."""

_FIRST_CAPACITY = 1 << 16


class Upload:
    """Host arrays put into one (pinned) buffer, and views of its twin on the device.

    The buffers stay from pass to pass, so a view's address depends on what was put before it in
    the same pass and on nothing else. On a CPU host and device share one buffer.

    Attributes:
        device: where the views are.

    Invariant: what ``put`` returned holds its numbers from ``send`` on, until the next ``send``.
    The device reads them in the order of its stream: a pass that is queued while another one runs
    overwrites that one's only when it is over.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._used = 0
        self._sent: torch.cuda.Event | None = None
        self._outgrown: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._allocate(_FIRST_CAPACITY)

    def start(self) -> None:
        """A new pass: what was put before is no longer needed."""
        if self._sent is not None:  # the copies of the pass before may still be reading
            self._sent.synchronize()
            self._sent = None
        if self._outgrown:
            self._allocate(2 * (self._used + sum(host.numel() for host, _ in self._outgrown)))
            self._outgrown = []
        self._used = 0

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """An array's view on the device, of the same shape and type."""
        number = array.dtype.type
        if not array.size:
            return self._nothing[number].view(array.shape)  # many a pass has no such rows
        if self._used + array.nbytes > self._host.numel():
            self._grow(array.nbytes)
        start = self._used // array.itemsize
        place = slice(start, start + array.size)
        self._used = _aligned(self._used + array.nbytes)
        self._host_typed[number][place] = array.reshape(-1)
        view = self._typed[number][place]
        return view if array.ndim == 1 else view.view(array.shape)

    def send(self) -> None:
        """Copy all that was put: one copy, but in the pass in which the buffer had to grow."""
        if self._host is self._on_device:
            return
        for host, on_device in [*self._outgrown, (self._host[: self._used], self._on_device)]:
            on_device[: host.numel()].copy_(host, non_blocking=True)
        if self.device.type == "cuda":
            self._sent = torch.cuda.Event()
            self._sent.record()

    def _grow(self, num_bytes: int) -> None:
        """Go on in new buffers; the views that were handed out keep the old ones."""
        self._outgrown.append((self._host[: self._used], self._on_device))
        self._allocate(max(2 * self._host.numel(), num_bytes))
        self._used = 0

    def _allocate(self, num_bytes: int) -> None:
        pinned = self.device.type == "cuda"
        size = _aligned(num_bytes)
        self._host = torch.zeros(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._on_device = self._twin(self._host)
        # A slice of one of these is one operator, a slice seen as another type is two.
        self._host_typed = {number: self._host.numpy().view(number) for number in TORCH_OF}
        self._typed = {number: self._on_device.view(dtype) for number, dtype in TORCH_OF.items()}
        self._nothing = {number: typed[:0] for number, typed in self._typed.items()}

    def _twin(self, host: torch.Tensor) -> torch.Tensor:
        return host if self.device.type == "cpu" else torch.zeros_like(host, device=self.device)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
