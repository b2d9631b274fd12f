# SPDX-License-Identifier: Apache-2.0
"""What a model's forward is given: the rows of a pass on the device, layer by layer.

A pass has few different shapes: rows are filled up to a ``bucket``. Rows that fill up read
position 0 and write vLLM's null block, which no request owns.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch

_STEPS = ((64, 8), (128, 16), (1024, 32), (4096, 64), (1 << 62, 256))
"""Up to so many rows, to a multiple of this: 40 numbers of rows up to 1,024, and from 33 rows on
less than a quarter of filling (a product's time is proportional to its rows)."""


MOST_FILLING = _STEPS[-1][1] - 1
"""Rows that fill up a pass, at most."""


def bucket(count: int) -> int:
    """How many rows a pass of ``count`` rows is filled up to.

    Plans have another number of rows at nearly every step. oneDNN compiles a product for each
    number that it has not seen, and a CUDA graph is captured for one.
    """
    step = next(step for most, step in _STEPS if count <= most)
    return -(-count // step) * step


@dataclass(slots=True)
class AttentionCall:
    """Rows [start, stop) that one call of the attention backend works on.

    Attributes:
        build: makes the backend's metadata, where each sequence is rows that attend to one canvas;
            None: there is nothing to attend to yet.
    """

    start: int
    stop: int
    build: Callable[[], Any] | None = None
    _metadata: Any = None

    @property
    def metadata(self) -> Any:
        """Built where it is used first: the device works on earlier layers meanwhile."""
        if self._metadata is None and self.build is not None:
            self._metadata = self.build()
        return self._metadata


def chunks(calls: list[AttentionCall], total: int) -> list[tuple[int, int]]:
    """The calls' rows, the last one's stretched to ``total``: what fills up is in the last."""
    return list(pairwise([*(call.start for call in calls), total]))


class RowAdapters(Protocol):
    """Which adapter (LoRA) each of a set of rows has."""

    def use(self, start: int, stop: int) -> None:
        """Layers work on rows [start, stop) of the set next."""
        ...


@dataclass(slots=True)
class LayerRows:
    """The rows that are active in a layer; layers between two join layers share one.

    Attributes:
        num_rows: rows [0, num_rows) of the pass are active.
        num_finished: the same, filled up.
        positions, slots: int64 [P], canvas position and slot of the paged cache of every row
            that is projected: the active ones, tested ones once more as they were stored, and
            what fills up. P >= num_finished, equal where nothing is tested.
        num_queries: how many of the recorder's query rows are active.
        calls: over the active rows. More than one: the canvas exceeds the row budget and is
            worked on in these row chunks.
        adapters: of the projected rows; None: the pass has none.
    """

    num_rows: int
    num_finished: int
    positions: torch.Tensor
    slots: torch.Tensor
    num_queries: int
    calls: list[AttentionCall]
    adapters: RowAdapters | None = None


@dataclass(slots=True)
class CandidateRows:
    """The rows whose candidates are wanted, all that the last layer has to finish.

    Attributes:
        rows: int64 [W filled up], plan by plan; calls: over the W rows.
        adapters: of the W rows filled up; None: the pass has none.
    """

    rows: torch.Tensor
    calls: list[AttentionCall]
    adapters: RowAdapters | None = None


@dataclass(slots=True)
class PassRows:
    """A pass on the device.

    Attributes:
        tokens: int64 [R0 filled up], of the rows that join at layer 0; empty where none does.
        stored: bool [R0 filled up], of these, whose input is stored and no token's embedding;
            None: no row's is.
        layers: what is active in each layer; None before the first join layer.
        window: rows whose candidates are wanted.
    """

    tokens: torch.Tensor
    stored: torch.Tensor | None
    layers: list[LayerRows | None]
    window: CandidateRows

    @property
    def in_chunks(self) -> bool:
        """Whether some layer's rows exceed the row budget. The last layer has the most."""
        last = self.layers[-1]
        return last is not None and len(last.calls) > 1


class Recorder(Protocol):
    """Keeps, while a pass runs, what its measurements need.

    Attributes:
        read_layers: those whose queries it keeps.
        tested_rows: int64 [M], rows of the pass whose attention is compared.
        old_inputs: [stored, M, d], their inputs of the layers that store them, as they were
            before the pass; None: nothing is tested.
    """

    read_layers: Set[int]
    tested_rows: torch.Tensor
    old_inputs: torch.Tensor | None

    def save_queries(self, layer: int, rows: LayerRows, q: torch.Tensor) -> None:
        """Called in each layer with the rotated queries [P, Hq, D] of all projected rows."""
        ...
