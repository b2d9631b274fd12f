# SPDX-License-Identifier: Apache-2.0
"""``bench card``: a whole run at a tiny size, by each executor, and the floors by hand."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from tests.device import ON_CARD
from tests.engine.whole_passes import attention, uncaptured
from tests.engines_kept import keep_engines
from tests.recorded_graphs import RecordedGraphs
from vllm_elastic.bench import card, pass_parts
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.dummy_model import dummy_engine, shape_of_sizes
from vllm_elastic.bench.made_plans import KINDS, PlanMaker
from vllm_elastic.bench.pass_floor import Floor, Rates, bytes_moved, operations
from vllm_elastic.bench.pass_parts import PARTS
from vllm_elastic.bench.pass_time import PassTime
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.decoding.plan import PassPlan, Segment
from vllm_elastic.runner.compiled_layer import CompiledLayer
from vllm_elastic.runner.cuda_graphs import CudaGraphs
from vllm_elastic.runner.executor import (
    CompiledExecutor,
    EagerExecutor,
    GraphExecutor,
    PassExecutor,
    WholePassExecutor,
)

SIZES = ["--width", "64", "--heads", "2", "--layers", "4", "--mlp", "96", "--vocabulary", "300"]
WORDS = ["card", *SIZES, "--canvas", "64", "100", "--window", "8", "--repeats", "1"]
WORDS += ["--max-num-batched-tokens", "256", "--dtype", "float32"]
COMPILES = not ON_CARD and shutil.which("g++") is not None


@pytest.mark.engine
def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_engines()
    out = tmp_path / "card.json"
    words = [*WORDS, "--batch-size", "1", "3", "--parts", "--json", str(out)]
    args = make_parser().parse_args(words)
    args.function(args)
    document = json.loads(out.read_text())
    rows = document["passes"]
    assert [(row["canvas"], row["batch_size"], row["pass"]) for row in rows] == [
        (canvas, batch, kind) for canvas in (64, 100) for batch in (1, 3) for kind in KINDS
    ]
    rates = document["machine"]
    for row in rows:
        assert row["executor"] == "eager" or ON_CARD
        floors = row["bytes_floor_milliseconds"], row["operations_floor_milliseconds"]
        assert min(floors) > 0
        assert row["times_floor"] == pytest.approx(row["milliseconds"] / max(floors))
        assert row["gap_milliseconds"] > row["scheduling_milliseconds"] > 0
        assert set(row["shares"]) == {*PARTS, "other"}
        assert row["shares"]["products"] > 0
    # Three canvases of 100 are more than the 256 rows of a step: the scheduler would take two.
    requests = {(r["canvas"], r["batch_size"]): r["requests"] for r in rows if r["pass"] == "full"}
    assert requests == {(64, 1): 1, (64, 3): 3, (100, 1): 1, (100, 3): 2}
    assert {row["requests"] for row in rows if row["pass"] == "window"} == {1, 3}
    printed = capsys.readouterr().out
    assert "| eager | 100 | 3 | window, elastic-block | 3 | 36 |" in printed
    assert f"{rates['threads']} thread(s), float32" in printed and rates["device"] in printed


@pytest.mark.engine
@pytest.mark.slow
def test_all_of_a_part_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that passes no longer call, or that a class overrides, would count as nothing."""
    keep_engines()
    args = make_parser().parse_args([*WORDS, "--batch-size", "1"])
    shape = shape_of_sizes(args)
    engine = dummy_engine(shape, args, args.batch_size, max(args.canvas))
    named = pass_parts.places()
    places = {place for part in named.values() for place in part}
    executors: list[PassExecutor] = [EagerExecutor(engine.runner.model)]
    if COMPILES:
        with torch.inference_mode():
            executors.append(CompiledExecutor(engine.runner.model, 256))
    else:
        places.discard((CompiledLayer, "__call__"))
    called, seen = set(), set()
    executors.append(_whole_passes(engine.runner))

    def noted(place: Any) -> Any:
        original = vars(place[0])[place[1]]
        function = getattr(original, "__func__", original)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            called.add(place)
            return function(*args, **kwargs)

        return classmethod(wrapper) if isinstance(original, classmethod) else wrapper

    for owner, attribute in places:
        monkeypatch.setattr(owner, attribute, noted((owner, attribute)))
    maker = PlanMaker(64, 8, 2, shape.vocabulary, engine.runner.cache.block_size)
    for executor, kind in itertools.product(executors, KINDS):
        called.clear()
        engine.runner._executor = executor
        plan = maker.plan(kind, 0)
        with torch.inference_mode(), attention(engine.runner):
            engine.runner.run([plan])
        assert plan.measure is None or called.issuperset(named["statistics"])
        seen |= called
    assert seen == places


def _whole_passes(runner: Any) -> WholePassExecutor:
    """Recorded without a card, with an attention that a recording may have in it."""
    passes = uncaptured(runner, 64, 1)
    graphs = CudaGraphs(runner.device) if ON_CARD else RecordedGraphs()
    builder = runner._attention_group.get_metadata_builder()
    with torch.inference_mode(), attention(runner):
        passes.capture(graphs, [64], builder, runner.model_config.max_model_len)
    return WholePassExecutor(passes, EagerExecutor(runner.model))


@pytest.mark.engine
@pytest.mark.skipif(ON_CARD, reason="`test_run` has a card's own graphs")
def test_by_graphs_and_eagerly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same engine by turns; what does not fit into its cache is left out and named."""
    keep_engines()
    args = make_parser().parse_args([*WORDS, "--batch-size", "1"])
    args.refresh_from = 2
    shape = shape_of_sizes(args)
    engine = dummy_engine(shape, args, args.batch_size, max(args.canvas))
    runner = engine.runner
    graphs = RecordedGraphs()
    replays = [0]

    def counted(graph: Any) -> None:
        replays[0] += 1
        type(graphs).take_memory(graphs, graph)

    monkeypatch.setattr(graphs, "take_memory", counted)
    executor = GraphExecutor(runner.model)
    with torch.inference_mode():
        executor.capture(graphs, [16])
    runner._executor = executor
    args.canvas, args.batch_size = [64], [1, 1000]
    rows = card.measure(engine, shape, Rates(1e9, 1e9), args)
    assert [row["executor"] for row in rows] == ["eager"] * len(KINDS) + ["graphs"] * len(KINDS)
    # Four windows of 12 rows, twice: both parts of 4 layers, the last of which finishes the
    # window's 8 rows.
    assert replays[0] == 4 * 2 * (2 * 4 - 1)
    assert runner._executor is executor
    assert "(batch 1000 of canvas 64: the KV cache holds" in capsys.readouterr().out


def test_layers_graphs_beside_whole_passes() -> None:
    """Each by its own, where the runner has both."""
    layers = GraphExecutor(None)
    whole = WholePassExecutor(MagicMock(), layers)
    found = card.executors(SimpleNamespace(model=None, _executor=whole))
    assert list(found) == ["eager", "graphs", "whole passes"]
    assert found["graphs"] is layers and found["whole passes"] is whole


def test_a_refresh_behind_the_last_layer_is_refused() -> None:
    args = make_parser().parse_args([*WORDS, "--refresh-from", "4"])
    with pytest.raises(SystemExit, match="--refresh-from 4: the model has layers 0 to 3"):
        args.function(args)


SHAPE = ModelShape(width=3, layers=2, heads=1, kv_heads=1, mlp=5, vocabulary=7)
MAKER = PlanMaker(canvas=4, window=2, refresh_from=1, vocabulary=7, block_size=32)
PROJECT, FINISH = 3 * 9, 9 + 3 * 15  # weights of a layer's two parts; the head has 3 * 7
LAYER_KEYS = 2 * 3  # key and value of a position


def test_operations() -> None:
    """Counted by hand: a canvas of 4, a window of 2, two layers of width 3, one head."""
    attended = 4 * 4 * 3  # scores over four keys, and the values they weigh
    full = 2 * 4 * 2 * PROJECT + (4 + 2) * (attended + 2 * FINISH) + 2 * 2 * 21
    assert operations(SHAPE, MAKER.plan("full", 0)) == full
    refresh = 4 * 2 * PROJECT + 2 * (attended + 2 * FINISH) + 2 * 2 * 21
    assert operations(SHAPE, MAKER.plan("refresh", 0)) == refresh
    # Positions 0, 1 and the window's 2 and 3 are rows of a window pass: here, the whole canvas.
    assert operations(SHAPE, MAKER.plan("window", 0)) == full


def moved(*plans: PassPlan) -> int:
    assert bytes_moved(SHAPE, plans) % 2 == 0
    return bytes_moved(SHAPE, plans) // 2  # numbers


def test_bytes() -> None:
    """Numbers read and written, counted by hand."""
    layer, head = PROJECT + FINISH, 21
    full = MAKER.plan("full", 0)
    # Four positions' keys and values read and written in two layers; layer 1's input written.
    of_full = 2 * (4 + 4) * LAYER_KEYS + 4 * 3
    assert moved(full) == 2 * layer + head + of_full
    assert moved(full, MAKER.plan("full", 1)) == 2 * layer + head + 2 * of_full
    # In layer 1 alone, whose inputs are read.
    of_refresh = (4 + 4) * LAYER_KEYS + 4 * 3
    assert moved(MAKER.plan("refresh", 0)) == layer + head + of_refresh
    # Two rows from the embedding, and one that joins: its input is read, theirs is written.
    segments = [Segment(0, np.array([2, 3])), Segment(1, np.array([0]))]
    joining = replace(MAKER.plan("window", 0), segments=segments)
    of_joining = (4 + 2 + 4 + 3) * LAYER_KEYS + (2 + 1) * 3
    assert moved(joining) == 2 * layer + head + of_joining
    assert moved(joining, MAKER.plan("refresh", 1)) == (2 * layer + head + of_joining + of_refresh)


def test_times_floor_is_of_the_longer_floor() -> None:
    """Medians, 12 ms on the device; the host adds 1 ms to a pass and 2 ms of scheduling."""
    plan = MAKER.plan("full", 0)
    work, num_bytes = operations(SHAPE, plan), bytes_moved(SHAPE, [plan])
    times = [PassTime(whole=0.013, device=0.012), PassTime(9.0, 8.0), PassTime(0.011, 0.01)]
    group = card.Group("graphs", "full", [plan])
    for rates, floor in (
        (Rates(work / 0.004, num_bytes / 0.003), 4),
        (Rates(work / 0.004, num_bytes / 0.006), 6),
    ):
        assert Floor.of(SHAPE, [plan], rates).seconds == pytest.approx(floor / 1e3)
        row = card.row_of(group, times, 0.002, SHAPE, rates)
        assert row["times_floor"] == pytest.approx(12 / floor)
        assert row["milliseconds"] == pytest.approx(12)
        assert row["gap_milliseconds"] == pytest.approx(3)
        assert (row["requests"], row["rows"], row["executor"]) == (1, 4, "graphs")


def test_a_part_inside_another_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled layer calls attention, which is no product."""

    now = [0]

    class Layer:
        def whole(self) -> None:
            now[0] += 2
            self.attend()
            self.attend()

        def attend(self) -> None:
            now[0] += 5

    places = {"products": [(Layer, "whole")], "attention": [(Layer, "attend")]}
    monkeypatch.setattr(pass_parts, "places", lambda: places)
    monkeypatch.setattr(pass_parts, "clock", lambda: now[0])
    with pass_parts.parts_timed() as seconds:
        Layer().whole()
    assert seconds == {"products": 2, "attention": 10}
