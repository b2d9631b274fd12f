# SPDX-License-Identifier: Apache-2.0
"""``bench replay``: runs of the tiny model through passes of another one, row for row."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.engines_kept import keep_engines
from vllm_elastic.bench import replay
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.recorded_plans import plans_of
from vllm_elastic.bench.scheduler_time import SchedulerSeconds
from vllm_elastic.decoding import overlap

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada" / "checkpoint"
POLICIES = ("none", "dual-cache", "elastic", "elastic-block")
SIZES = ["--width", "64", "--heads", "2", "--mlp", "96", "--vocabulary", "300"]
SIZES += ["--dtype", "float32"]

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict[str, Any]]]:
    """By policy: what ``bench run`` would write."""
    keep_engines()
    engine = BenchEngine(TINY, batch_size=3, rows=True)
    generator = np.random.default_rng(5)
    prompts = [generator.integers(10, 300, 20 + 15 * i).tolist() for i in range(3)]
    return {
        policy: engine.run(
            [
                {"prompt_token_ids": prompt, "max_tokens": 32, "elastic_policy": policy}
                for prompt in prompts
            ]
        )
        for policy in POLICIES
    }


@pytest.mark.parametrize("policy", POLICIES)
def test_plans_have_the_recorded_rows(policy: str, records: Any) -> None:
    """Rows of every join layer, window and measured rows, at equal depth; twice as deep, twice."""
    measured: Counter[str] = Counter()
    for record in records[policy]:
        layers = record["layers"]
        plans = plans_of(record, layers, 300)
        deeper = plans_of(record, 2 * layers, 300)
        assert len(plans) == len(record["steps"]) == record["passes"]
        assert sum(plan.row_layers(layers) for plan in plans) == record["row_layers"]
        assert sum(plan.row_layers(2 * layers) for plan in deeper) == 2 * record["row_layers"]
        for plan, entry in zip(plans, record["steps"], strict=True):
            assert [[s.join_layer, len(s.positions)] for s in plan.segments] == entry["segments"]
            rows = np.concatenate([s.positions for s in plan.segments])
            assert len(np.unique(rows)) == len(rows) == entry["rows"]
            assert set(plan.window) <= set(plan.segments[0].positions)
            assert set(plan.tested) | set(plan.probes) <= set(plan.segments[0].positions)
            found = len(plan.window), len(plan.queries), len(plan.tested), plan.num_saved_rows
            names = ("window", "queries", "tested", "saved_rows")
            assert found == tuple(entry[name] for name in names)
            assert len(plan.tokens) == record["canvas"]
            if entry["committed"]:
                assert (plan.tokens[entry["committed"]] == 299).all(), "masked until then"
            measured["tested"] += len(plan.tested)
            measured["probes"] += len(plan.probes)
    assert (measured["tested"] > 0, measured["probes"] > 0) == (
        policy == "elastic",
        policy == "elastic-block",
    )


def test_run(
    records: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The passes that really run have the recorded row-layers; the tokens are the answers'."""
    files = [tmp_path / f"{policy}.jsonl" for policy in POLICIES]
    for path, policy in zip(files, POLICIES, strict=True):
        path.write_text("".join(json.dumps(record) + "\n" for record in records[policy]))
    layers = records["none"][0]["layers"]
    executed: list[list[tuple[str, int, tuple[int, ...]]]] = []
    make = replay.replay

    def watched(runner: Any, *args: Any) -> Any:
        start, steps = runner.start, []

        def counted(plans: Any) -> Any:
            steps.append([(p.request_id, p.row_layers(layers), tuple(p.block_ids)) for p in plans])
            return start(plans)

        runner.start = counted
        try:
            return make(runner, *args)
        finally:
            del runner.start
            executed.append(steps)  # type: ignore[arg-type]

    monkeypatch.setattr(replay, "replay", watched)
    out = tmp_path / "replay.json"
    words = ["replay", *map(str, files), *SIZES, "--layers", str(layers), "--batch-size", "1", "2"]
    args = make_parser().parse_args([*words, "--requests", "6", "--json", str(out)])
    args.function(args)
    rows = json.loads(out.read_text())["runs"]
    assert [(row["batch_size"], row["policy"]) for row in rows] == [
        (batch, policy) for batch in (1, 2) for policy in POLICIES
    ]
    for row, steps in zip(rows, executed[1::2], strict=True):  # each behind its warm-up
        recorded = 2 * records[row["policy"]]
        assert row["tokens"] == sum(len(record["token_ids"]) for record in recorded)
        assert row["passes"] == sum(record["passes"] for record in recorded)
        assert row["row_layers"] == sum(record["row_layers"] for record in recorded)
        assert row["row_layers"] == sum(work for step in steps for _, work, _ in step)
        assert row["steps"] == len(steps) and max(map(len, steps)) == row["batch_size"]
        for step in steps:  # no block is two requests'
            blocks = [block for _, _, own in step for block in own]
            assert len(set(blocks)) == len(blocks) and min(blocks) > 0
        assert sum(row["kinds"].values()) == pytest.approx(row["seconds"])
        assert row["seconds"] > row["scheduling_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert "| elastic-block | elastic-block | 2 | 1 | 6 |" in capsys.readouterr().out


def test_two_groups(records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is started while the other's results are still to come; all passes are the recorded."""
    keep_engines()
    words = ["replay", "run", *SIZES, "--layers", str(records["none"][0]["layers"])]
    args = make_parser().parse_args([*words, "--batch-size", "3"])
    shape = replay.shape_of_sizes(args)
    path = tmp_path / "none.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records["none"]))
    run = replay.Run.read(path, layers=shape.layers, vocabulary=shape.vocabulary)
    engine = replay.dummy_engine(shape, args, args.batch_size, run.longest)
    monkeypatch.setattr(overlap, "GROUP_ROWS", 1)
    start, flying, seen = engine.runner.start, [], []

    def started(plans: Any) -> Any:
        in_flight = start(plans)
        names = {plan.request_id for plan in plans}
        assert not any(names & others for others in flying), "its last result is not there yet"
        flying.append(names)
        seen.append(len(flying))

        def results() -> Any:
            flying.remove(names)
            return in_flight.results()

        return SimpleNamespace(results=results)

    monkeypatch.setattr(engine.runner, "start", started)
    capacity = replace(replay.capacity_of(engine), seats=3, in_flight=2)
    outcome = replay.replay(
        engine.runner, run, capacity, 3 * run.recording.requests, SchedulerSeconds(0, 0)
    )
    assert not flying and max(seen) == 2 and seen.count(2) > len(seen) / 2
    assert outcome.passes == 3 * sum(record["passes"] for record in records["none"])
    assert outcome.row_layers == 3 * sum(record["row_layers"] for record in records["none"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [{"kind": "first"}]}, "none.jsonl: record 1 lacks attention_stride"),
        ({"policy": "elastic"}, "none.jsonl: its requests have several policies: elastic, none"),
    ],
)
def test_a_file_that_cannot_be_replayed_is_named(
    change: dict[str, Any], message: str, records: Any, tmp_path: Path
) -> None:
    first, *rest = records["none"]
    path = tmp_path / "none.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [first | change, *rest]))
    args = make_parser().parse_args(["replay", str(path), *SIZES, "--layers", "2"])
    with pytest.raises(SystemExit, match=message):
        args.function(args)
