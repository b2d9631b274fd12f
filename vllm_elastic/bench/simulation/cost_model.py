# SPDX-License-Identifier: Apache-2.0
"""How long a step takes: a roofline for each part of it, and the host's overheads."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vllm_elastic.bench.simulation.device import PARTS, Device
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.bench.simulation.recording import Columns, Floats
from vllm_elastic.models.rows import bucket

Bools = npt.NDArray[np.bool_]

_filled_up = np.vectorize(functools.cache(bucket), otypes=[np.float64])

BOUNDS = ("compute", "bandwidth")


@dataclass(frozen=True)
class WholePasses:
    """Steps that one graph replays (``runner.graphed_pass``): of how many rows and requests at
    most; none by default."""

    rows: int = 0
    requests: int = 0


@dataclass(frozen=True, slots=True)
class HostSeconds:
    """The host's time for a step, [...] each.

    Attributes:
        planning: before it. launching: while the device works on it. delaying: by which its work
            is longer, where the device is the host. results: after it.
    """

    planning: Floats
    launching: Floats
    delaying: Floats
    results: Floats


class CostModel:
    """Seconds of a step from the summed work of its passes (``Columns``).

    Every part takes the longer of its operations over the device's rate and its bytes over the
    bandwidth; parts follow one another. A layer's weights are read once by all of a step's rows,
    a canvas's keys and values once a layer by each of its passes. Products, cache writes and the
    head's logits are of the rows that a step is filled up to (``models.rows.bucket``).
    """

    def __init__(
        self, shape: ModelShape, device: Device, whole_passes: WholePasses = WholePasses()
    ) -> None:
        self.shape = shape
        self.device = device
        self.whole_passes = whole_passes
        self.columns = Columns(shape.layers)
        self._factors = np.array([device.factors.get(part, 1.0) for part in PARTS])
        self._rate = device.flops * device.efficiency
        self._float32_rate = device.float32_flops * device.efficiency
        self._bandwidth = device.bandwidth * device.efficiency

    def work_seconds(self, work: Floats) -> Floats:
        """What the device's work takes at its rates, without its ``factors``.

        Args:
            work: [..., columns.count].

        Returns:
            [..., parts, 2]: seconds of each of ``PARTS``, by what bounds them (``BOUNDS``).
        """
        shape, columns = self.shape, self.columns
        size, width = shape.bytes_per_number, shape.width
        active, keys = work[..., columns.rows], work[..., columns.keys]
        rows, projected = _filled_up(active), _filled_up(work[..., columns.projected])
        own_window = work[..., columns.window]
        window = _filled_up(own_window)
        # The last layer makes keys and values of all rows, but finishes the window's only; in a
        # whole pass's graph all of them.
        whole = self.is_whole(work)
        finished = rows.copy()
        finished[..., -1] = np.where(whole, rows[..., -1], window)
        attended = work[..., columns.attended].copy()
        attended[..., -1] = np.where(whole, attended[..., -1], work[..., columns.window_attended])
        # What fills up attends in a graph only: to the last canvas, here to one of the mean length.
        attended *= np.where(whole[..., None], rows / np.maximum(active, 1), 1)
        weights = shape.parameters_read(finished) * size * (rows > 0)
        seconds = np.zeros((*work.shape[:-1], len(PARTS), len(BOUNDS)))

        def put(part: str, compute: Floats, transfer: Floats) -> None:
            of_compute = compute >= transfer
            at = PARTS.index(part)
            seconds[..., at, 0] = np.where(of_compute, compute, 0.0).sum(axis=-1)
            seconds[..., at, 1] = np.where(of_compute, 0.0, transfer).sum(axis=-1)

        put(
            "products",
            shape.product_operations(projected, finished) / self._rate,
            weights / self._bandwidth,
        )
        put(
            "attention",
            shape.attention_operations(attended) / self._rate,
            2 * shape.key_width * size * keys / self._bandwidth,
        )
        written = (2 * shape.key_width + width) * size * rows
        put("cache writes", np.zeros_like(rows), written / self._bandwidth)
        # Logits are written once and the window's read twice (runner/candidate_kernel.py).
        logits = (window + 2 * own_window) * shape.vocabulary * size
        put(
            "candidates",
            (shape.head_operations(window) / self._rate)[..., None],
            ((shape.head_parameters * size * (window > 0) + logits) / self._bandwidth)[..., None],
        )
        operations, moved = self._statistics(work)
        put("statistics", operations[..., None], (moved / self._bandwidth)[..., None])
        return seconds

    def _statistics(self, work: Floats) -> tuple[Floats, Floats]:
        """Seconds of the statistics' operations at their rate, and bytes that they move."""
        shape, columns, size = self.shape, self.columns, self.shape.bytes_per_number
        queries, keys = work[..., columns.queries], work[..., columns.query_keys]
        operations = 2 * shape.width * queries
        if self.device.paged_statistics:
            # Keys where they are, in their own type: read from memory once, though they are looked
            # at twice, and once more for some tested rows. What each KV head's program finds of a
            # position is written, read and added up.
            read = (keys + work[..., columns.tested_keys]) * shape.key_width * size
            return 2 * operations / self._rate, read + 12 * shape.kv_heads * keys
        # Keys are gathered, then copied to float32, then read; scores are written, go through a
        # softmax and are summed.
        gathered = keys * shape.key_width * (3 * size + 8)
        return operations / self._float32_rate, gathered + 16 * shape.heads * queries

    def is_whole(self, work: Floats) -> Bools:
        """[...], whether one graph replays the step: few requests, all of whose rows join at layer
        0, and few rows."""
        rows, requests = work[..., self.columns.rows], work[..., self.columns.requests]
        joined: Bools = (
            (rows[..., 0] == rows[..., -1])
            & (rows[..., -1] <= self.whole_passes.rows)
            & (requests <= self.whole_passes.requests)
        )
        return joined

    def host_counts(self, work: Floats) -> Floats:
        """[..., 4]: steps, layers with rows, passes, and passes with statistics."""
        columns = self.columns
        layers = (work[..., columns.rows] > 0).sum(axis=-1)
        requests, measured = work[..., columns.requests], work[..., columns.measured]
        return np.stack([np.ones_like(requests), layers, requests, measured], axis=-1)

    def step_seconds(self, work: Floats) -> tuple[Floats, HostSeconds]:
        """A step's seconds on the device, [..., parts, 2] as ``work_seconds``, and the host's."""
        device = self.device
        seconds = self.work_seconds(work) * self._factors[:, None]
        counts, whole = self.host_counts(work), self.is_whole(work)
        per_step = np.array([device.step_seconds, 0.0, device.pass_seconds])
        between = counts[..., :3] @ per_step + counts[..., 3] * device.statistics_seconds
        between = np.maximum(between - whole * device.whole_pass_saves, 0.0)
        results = device.results_share * between
        launches, none = np.where(whole, 1, counts[..., 1]) * device.layer_seconds, 0.0 * between
        launching, delaying = (launches, none) if device.asynchronous else (none, launches)
        return seconds, HostSeconds(between - results, launching, delaying, results)
