# SPDX-License-Identifier: Apache-2.0
"""Passes by graphs against the same passes run eagerly, bit for bit, over poisoned buffers.

Without a GPU graphs are recorded instead of captured (``tests.recorded_graphs``). What a pass did
not bring to the buffers is NaN, or a position that is another one's.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import _disable_current_modes

from tests.device import ON_CARD, SIMULATED
from tests.recorded_graphs import NAN, RecordedGraphs
from vllm_elastic.models import ranks
from vllm_elastic.models.layers import PreNormBlock
from vllm_elastic.models.rows import PassRows, Recorder, bucket
from vllm_elastic.runner.cuda_graphs import CudaGraphs
from vllm_elastic.runner.executor import GraphExecutor
from vllm_elastic.runner.graphed_block import (
    Graph,
    GraphedBlock,
    Graphs,
    StaticRows,
    Tensors,
)

from .checked_passes import CheckedExecutor, run_by
from .conftest import Served, make_engine, poison
from .driver import Driver, prompt_of
from .random_families import FAMILIES, save_family
from .schedules import Schedule, play, schedules, the_same_always
from .test_oracle import CONFIGS, compare, request
from .test_transfers import Operators, kind_of

pytestmark = pytest.mark.engine

COUNTS = sorted({bucket(count) for count in range(1, 65)})
"""Passes of these tests have more rows now and then."""


class Counted:
    """Graphs whose replays are counted."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self.replays = 0

    def capture(self, work: Callable[[], Tensors]) -> Graph:
        graph = self._graphs.capture(work)

        def replay() -> None:
            self.replays += 1
            with _disable_current_modes():  # nobody counts what is in it
                graph.replay()

        return SimpleNamespace(outputs=graph.outputs, replay=replay)


def capturing(device: torch.device) -> AbstractContextManager[Any]:
    """As a runner captures: ranks of cards tell each other where their parts are."""
    return ranks.capturing(device) if ON_CARD else contextlib.nullcontext()


class CheckedGraphs(CheckedExecutor):
    """Graphs over poisoned buffers."""

    tested: GraphExecutor

    def __init__(self, runner: Any) -> None:
        super().__init__(runner, GraphExecutor(runner.model))
        self._graphs = Counted(CudaGraphs(runner.device) if ON_CARD else RecordedGraphs())
        with torch.inference_mode(), capturing(runner.device):
            self.tested.capture(self._graphs, COUNTS)

    def run(
        self, tested: Callable[[], torch.Tensor], rows: PassRows, recorder: Recorder | None
    ) -> torch.Tensor:
        self._poison()
        before = self._graphs.replays
        hidden = super().run(tested, rows, recorder)
        replays = self._graphs.replays - before
        active = sum(layer is not None for layer in rows.layers)
        kind = "eager" if not replays else "all" if replays == 2 * active else "some"
        self.passes[kind] += 1
        return hidden

    def _poison(self) -> None:
        static = self.tested._static
        assert static is not None
        static.x.fill_(NAN)
        static.attended.fill_(NAN)
        static.positions.fill_(self._runner.model_config.max_model_len - 1)


@contextlib.contextmanager
def checked(served: Served) -> Iterator[CheckedGraphs]:
    """An engine whose passes are run both ways."""
    name = served.name
    if name not in _executors:
        _executors[name] = CheckedGraphs(served.engine.runner)  # type: ignore[attr-defined]
    with run_by(served, _executors[name]):
        yield _executors[name]


_executors: dict[str, CheckedGraphs] = {}


def test_passes_by_graphs_are_the_eager_ones(serve: Callable[[str], Served]) -> None:
    """Full passes, windows, refreshes and replays, of several requests, in changing batches."""

    @the_same_always(12)
    @given(schedule=schedules())
    def check(schedule: Schedule) -> None:
        served = serve(schedule.model)
        driver = Driver(served)
        poison(driver.engine)
        with checked(served):
            play(driver, schedule)

    check()
    seen: Counter[str] = sum((each.passes for each in _executors.values()), Counter())
    for kind in ("all", "some", "eager", "join later", "join at one layer", "chunks"):
        assert seen[kind] > 10, seen


@pytest.mark.parametrize("model", ["gqa-tied", "dream"])
def test_against_the_oracle(model: str, serve: Callable[[str], Served]) -> None:
    """Token for token and pass for pass, all configurations in one batch."""
    served = serve(model)
    cases = list(itertools.product([1, 6, 11], CONFIGS))
    poison(served.engine)
    with checked(served):
        results = served.engine.run([request(*case) for case in cases])  # type: ignore[attr-defined]
    compare(served, cases, results)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    oracle = save_family(family, tmp_path)
    served = Served(family, tmp_path, oracle, make_engine(tmp_path))
    with checked(served):
        served.engine.run([request(index, "block") for index in (1, 6)])  # type: ignore[attr-defined]
    assert _executors[family].passes["all"] > 1


BUDGET = {
    "none": {"first": 149, "full": 147},
    "dual-cache": {"first": 149, "window": 147, "full": 147},
    "elastic-block": {"first": 221, "window": 147, "refresh": 169, "measuring window": 244},
}
"""As that of ``test_transfers``, with a replay for one operator: what is in a graph costs the host
nothing. So 23 operators of each layer are in its two graphs."""


@pytest.mark.skipif(ON_CARD, reason="torch does not count launches of Triton's kernels")
@pytest.mark.parametrize("policy", BUDGET)
def test_operators_between_graphs(
    policy: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(serve("gqa-tied"))
    runner = driver.engine.runner
    executor, graphs = GraphExecutor(runner.model), Counted(RecordedGraphs())
    with torch.inference_mode():
        executor.capture(graphs, sorted({bucket(count) for count in range(1, 201)}))
    monkeypatch.setattr(runner, "_executor", executor)
    knobs: Any = {"policy": policy, "window": 16, "block_length": 16, "granularity": 8}
    driver.add(prompt_of(45, 3), 64, **knobs)  # the upload's buffer grows for it
    driver.run()
    run = runner.run
    most: Counter[str] = Counter()

    def counted(plans: Any) -> Any:
        before = graphs.replays
        with Operators() as seen:
            results = run(plans)
        count = seen.counts.total() + graphs.replays - before
        kind = kind_of(plans[0])
        most[kind] = max(most[kind], count)
        return results

    monkeypatch.setattr(runner, "run", counted)
    driver.add(prompt_of(45, 3), 64, **knobs)
    driver.run()
    driver.take_records()
    assert most.keys() == BUDGET[policy].keys()
    for kind, count in most.items():
        assert count <= BUDGET[policy][kind], most


# The test tested: what a faulty executor would do.


def _without_copy(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(StaticRows, name, lambda *_: None)


def _attended_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(GraphedBlock, "attention_buffer", lambda block, q: torch.zeros_like(q))
    patch.setattr(StaticRows, "take_attended", lambda *_: None)


def _capture(patch: pytest.MonkeyPatch, change: Callable[[GraphedBlock, int], None]) -> None:
    capture = GraphedBlock.capture

    def changed(block: GraphedBlock, graphs: Any, count: int) -> None:
        capture(block, graphs, count)
        change(block, count)

    patch.setattr(GraphedBlock, "capture", changed)


def _capture_as(patch: pytest.MonkeyPatch, part: str, change: Callable[..., Any]) -> None:
    """Graphs of another part than the model's."""
    capture = GraphedBlock.capture

    def captured(block: GraphedBlock, graphs: Any, count: int) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(PreNormBlock, part, change)
            capture(block, graphs, count)

    patch.setattr(GraphedBlock, "capture", captured)


def _another_bucket(patch: pytest.MonkeyPatch) -> None:
    def change(block: GraphedBlock, count: int) -> None:
        more = block._project[COUNTS[min(COUNTS.index(count) + 1, len(COUNTS) - 1)]]
        own = block._project[count]
        block._project[count] = SimpleNamespace(outputs=own.outputs, replay=more.replay)

    _capture(patch, change)


def _fewer_rows(patch: pytest.MonkeyPatch) -> None:
    """The last eight rows of a part are those of an earlier replay."""
    finish = PreNormBlock.finish

    def change(block: PreNormBlock, x: Any, attended: Any) -> Any:
        if len(x) <= 8:
            return finish(block, x, attended)
        finish(block, x[:-8], attended[:-8])
        return x

    _capture_as(patch, "finish", change)


def _another_layer(patch: pytest.MonkeyPatch) -> None:
    seen: dict[int, GraphedBlock] = {}

    def change(block: GraphedBlock, count: int) -> None:
        other = seen.setdefault(count, block)
        block._finish[count] = other._finish[count]

    _capture(patch, change)


def _not_static(patch: pytest.MonkeyPatch) -> None:
    """The graph reads a tensor that lives for one pass."""
    project = PreNormBlock.project
    held: dict[int, torch.Tensor] = {}

    def change(block: PreNormBlock, x: torch.Tensor, positions: torch.Tensor) -> Any:
        return project(block, held.setdefault(len(x), x.clone()), positions)

    _capture_as(patch, "project", change)


def _kept_too_long(patch: pytest.MonkeyPatch) -> None:
    """Another graph is replayed while the queries are still wanted."""
    project = GraphedBlock.project

    def change(block: GraphedBlock, x: torch.Tensor, positions: torch.Tensor) -> Any:
        q, k, v = project(block, x, positions)
        if len(x) in block._finish:
            before = block._static.x.clone()
            block._finish[len(x)].replay()
            block._static.x.copy_(before)
        return q, k, v

    patch.setattr(GraphedBlock, "project", change)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "input not copied": _without_copy("take"),
    "positions not copied": _without_copy("take_positions"),
    "positions of the pass before": _without_copy("start"),
    "attention not copied": _attended_elsewhere,
    "another number of rows": _another_bucket,
    "fewer rows than the pass has": _fewer_rows,
    "another layer's graph": _another_layer,
    "an input that is not static": _not_static,
    "outputs kept too long": _kept_too_long,
}


@pytest.mark.skipif(ON_CARD and not SIMULATED, reason="a pool's memory is not poisoned there")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(
    fault: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("gqa-tied")
    runner = served.engine.runner  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        FAULTS[fault](patch)
        executor = CheckedGraphs(runner)
        patch.setattr(runner, "_executor", executor)
        driver = Driver(served)
        name = driver.add(prompt_of(45, 3), 24, policy="elastic-block", window=16)
        with pytest.raises(AssertionError):
            driver.run()
    driver.llm_engine.abort_request([name])
    driver.step()
    driver.take_records()
