# SPDX-License-Identifier: Apache-2.0
"""Every pass of an engine run twice: by an executor under test, and eagerly; bit for bit.

A pass can be run twice: a row overwrites what is stored of it only behind the layer where it
joins, and reads nothing else that the pass writes.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_elastic.models.rows import PassRows, Recorder
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.executor import EagerExecutor, PassExecutor
from vllm_elastic.runner.statistics.pass_statistics import PassStatistics

from .conftest import Served

KEPT = ("queries", "old_queries")
"""What a pass puts into its recorder."""


class CheckedExecutor:
    """Compares all that either way of running a pass leaves.

    Attributes:
        passes: how many of each kind there were.
        same_shapes: whether it multiplies what the eager pass does, shape by shape.
    """

    name = "checked"
    same_shapes = True

    def __init__(self, runner: Any, tested: PassExecutor) -> None:
        self._runner = runner
        self._eager, self.tested = EagerExecutor(runner.model), tested
        self.passes: Counter[str] = Counter()

    def prepare(self, layout: PassLayout, statistics: PassStatistics) -> Callable[[], torch.Tensor]:
        run = self.tested.prepare(layout, statistics)
        rows = layout.put_rows(
            self._runner.traits.num_layers, statistics.tested_positions, statistics.query_rows
        )
        return lambda: self.run(run, rows, statistics.recorder)

    def run(
        self, tested: Callable[[], torch.Tensor], rows: PassRows, recorder: Recorder | None
    ) -> torch.Tensor:
        hidden = tested().clone()
        left = self._left(rows, recorder)
        expected = self._eager.run(rows, recorder)
        for name, wanted in self._left(rows, recorder).items():
            assert same(left[name], wanted), name
        if self.same_shapes:
            assert same(hidden, expected), "hidden"
        else:
            count = rows.window.calls[-1].stop  # what fills up is of no meaning, and differs
            torch.testing.assert_close(hidden[:count], expected[:count], rtol=1e-5, atol=1e-5)
        active = [layer for layer in rows.layers if layer is not None]
        joins = len({id(layer) for layer in active})
        self.passes[f"join {'later' if joins > 1 else 'at one layer'}"] += 1
        self.passes["chunks"] += rows.in_chunks
        self.passes["tested"] += getattr(recorder, "old_inputs", None) is not None
        self.passes["measured"] += recorder is not None
        return hidden

    def _left(self, rows: PassRows, recorder: Recorder | None) -> dict[str, torch.Tensor]:
        """Copies of the KV blocks that the pass writes, and of what it recorded."""
        last = rows.layers[-1]
        assert last is not None
        blocks = torch.unique(last.slots[: last.num_rows] // self._runner.cache.block_size)
        left = {name: cache[blocks] for name, cache in self._runner.kv_caches.items()}
        for name in KEPT:
            kept = getattr(recorder, name, None)
            if kept is not None:
                left[name] = kept.clone()
        return left


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, NaN too."""
    bits = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.view(bits), other.view(bits))


@contextlib.contextmanager
def run_by(served: Served, executor: PassExecutor) -> Iterator[None]:
    """The engine's passes are run by this executor for a while."""
    runner = served.engine.runner  # type: ignore[attr-defined]
    usual = runner._executor
    runner._executor = executor
    try:
        yield
    finally:
        runner._executor = usual
