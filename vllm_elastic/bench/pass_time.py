# SPDX-License-Identifier: Apache-2.0
"""How long an engine's pass takes: on the device, and what the host adds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_elastic.decoding.plan import PassPlan


@dataclass(frozen=True, slots=True)
class PassTime:
    """Seconds.

    Attributes:
        whole: from the plans to their results on the host.
        device: from the upload of the pass's numbers until its results are on their way back. The
            device waits in it where the host is slower to launch than the device to compute.
    """

    whole: float
    device: float

    @property
    def gap(self) -> float:
        """The device has nothing to do: the pass is laid out, its results are read."""
        return self.whole - self.device


def clock() -> float:
    """Seconds, once an accelerator has done what it was given."""
    import torch

    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def time_pass(runner: Any, plans: Sequence[PassPlan]) -> PassTime:
    """Run a pass of an ``ElasticRunner`` and wait for it."""
    import torch

    measure = _events if runner.device.type == "cuda" else _host_times
    started = clock()
    with torch.inference_mode(), measure() as (mark, seconds), _before_upload(mark):
        in_flight = runner.start(list(plans))
        mark()
        in_flight.results()
        whole = clock() - started
        return PassTime(whole, seconds())


@contextlib.contextmanager
def _before_upload(mark: Callable[[], None]) -> Iterator[None]:
    from vllm_elastic.runner.upload import Upload

    owner: Any = Upload
    send = Upload.send

    def marked(upload: Any) -> None:
        mark()
        send(upload)

    owner.send = marked
    try:
        yield
    finally:
        owner.send = send


Marks = tuple[Callable[[], None], Callable[[], float]]
"""Marks a moment of the device's; seconds from the first mark to the last."""


@contextlib.contextmanager
def _events() -> Iterator[Marks]:
    import torch

    events: list[Any] = []

    def mark() -> None:
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()

    yield mark, lambda: events[0].elapsed_time(events[-1]) / 1e3


@contextlib.contextmanager
def _host_times() -> Iterator[Marks]:
    """A CPU computes when it is told to: what has returned is done."""
    moments: list[float] = []
    yield lambda: moments.append(time.perf_counter()), lambda: moments[-1] - moments[0]
