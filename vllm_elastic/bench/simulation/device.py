# SPDX-License-Identifier: Apache-2.0
"""What a device can do: peaks from public figures, and what is lost on the way to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PARTS = ("products", "attention", "cache writes", "candidates", "statistics")
"""The device's work in a step, part by part."""


@dataclass(frozen=True)
class Device:
    """Rates and fixed overheads of one device.

    Attributes:
        flops: operations a second of dense matrix products in the model's number format.
        float32_flops: the same in float32, in which torch works out statistics.
        bandwidth: bytes a second of its memory. memory: bytes.
        efficiency: share of these rates that is reached.
        step_seconds: of host time a step: scheduling, output, one synchronisation.
        layer_seconds: of host time a layer with rows: what of it is launched one by one.
        pass_seconds: of host time for each request's pass in a step: plan and result.
        statistics_seconds: the same where attention statistics are wanted.
        whole_pass_saves: of host time a step that one graph replays: its numbers are laid out in
            one piece.
        results_share: of all this host time but the layers', what comes after a step: results.
        paged_statistics: worked out by our kernels (``attention.paged_statistics``), which read
            keys where they are; else by torch's operators, which copy them.
        asynchronous: layers' host time hides behind the device's work, as on a GPU.
        factors: what a part takes relative to what the rates say; 1 where it is not named.
    """

    name: str
    flops: float
    float32_flops: float
    bandwidth: float
    memory: float
    efficiency: float = 1.0
    step_seconds: float = 0.0
    layer_seconds: float = 0.0
    pass_seconds: float = 0.0
    statistics_seconds: float = 0.0
    whole_pass_saves: float = 0.0
    results_share: float = 0.4
    paged_statistics: bool = False
    asynchronous: bool = False
    factors: Mapping[str, float] = field(default_factory=dict)


def _gpu(name: str, bandwidth: float, memory: float) -> Device:
    """A Hopper GPU (SXM).

    Peaks are the vendor's: dense bfloat16, plain float32. Nothing here was measured on a GPU. The
    host's time for a step, a pass and what it measured is what fits ``host_time.py`` (of
    examples/studies) on a core of an Intel Xeon, and 0.2 ms a step for launching and reading back,
    which is a guess, as the efficiency is. Of it 0.25 to 0.45 was taking in results, and a whole
    pass saves a quarter of laying out a lone request (0.24 ms). With graphs a layer is some six
    calls from Python (docs/decisions.md), at 5 microseconds each; a whole pass is as many as one.
    """
    return Device(
        name=name,
        flops=989e12,
        float32_flops=67e12,
        bandwidth=bandwidth,
        memory=memory,
        efficiency=0.65,
        step_seconds=0.5e-3,
        layer_seconds=30e-6,
        pass_seconds=65e-6,
        statistics_seconds=125e-6,
        whole_pass_saves=60e-6,
        paged_statistics=True,
        asynchronous=True,
    )


DEVICES = {"h100": _gpu("h100", 3.35e12, 80e9), "h200": _gpu("h200", 4.8e12, 141e9)}
