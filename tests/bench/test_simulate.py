# SPDX-License-Identifier: Apache-2.0
"""The simulator: costs by hand, nothing lost, and a command line that says what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.fake_model import Scenario, drive
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.model_config import shape_of
from vllm_elastic.bench.simulation.batch import Capacity, Job
from vllm_elastic.bench.simulation.calibration import (
    Timed,
    fit,
    non_negative_least_squares,
    replay,
    report,
)
from vllm_elastic.bench.simulation.cluster import closed_loop, open_loop, run_closed
from vllm_elastic.bench.simulation.cost_model import CostModel, HostSeconds, WholePasses
from vllm_elastic.bench.simulation.device import DEVICES, PARTS, Device
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.bench.simulation.recording import Recording
from vllm_elastic.bench.simulation.replica import Replica
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding import overlap
from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.decoding.policies import POLICIES

LAYERS = 8
SMALL = ModelShape(width=4, layers=2, heads=2, kv_heads=1, mlp=6, vocabulary=10, bytes_per_number=2)
SLOW_HOST = Device("test", 100, 50, 1000, 0, step_seconds=1, layer_seconds=0.5, pass_seconds=0.25)
NO_WHOLE_PASSES = WholePasses()


def few_rows(count: int) -> StepLimits:
    return StepLimits(count, 1 << 30)


def record_of(policy: str, seed: int = 0, prompt: int = 9, length: int = 24) -> dict[str, Any]:
    """A record as ``bench run`` writes it: the real decoder on a model that answers at random."""
    knobs = {"policy": policy, "window": 16, "record": True, "record_rows": True, "granularity": 4}
    scenario = Scenario(
        ElasticConfig.from_dict(knobs),
        prompt_length=prompt,
        max_tokens=length,
        num_layers=LAYERS,
        end_tokens=frozenset({1}),
        seed=seed,
    )
    record = drive(scenario).request.record
    return {
        "id": seed,
        "policy": policy,
        "layers": LAYERS,
        "canvas": scenario.length,
        "token_ids": [token for token in scenario.shown if token != 1],
        "row_layers": record.row_layers,
        "steps": record.steps,
    }


def records(count: int, policy: str = "elastic") -> list[dict[str, Any]]:
    return [record_of(policy, seed, 5 + seed % 7, 8 + 3 * (seed % 6)) for seed in range(count)]


def one_pass(**changes: Any) -> dict[str, Any]:
    """Its numbers of rows are such that none fill up."""
    entry = {"kind": "window", "rows": 40, "segments": [[0, 24], [1, 16]], "window": 16}
    entry |= {"queries": 0, "attention_stride": 1, "tested": 0, "saved_rows": 0, **changes}
    return {"policy": "none", "layers": 2, "canvas": 40, "token_ids": [1], "steps": [entry]}


def seconds_of(
    device: Device, *passes: dict[str, Any], whole_passes: WholePasses = NO_WHOLE_PASSES
) -> tuple[dict[str, list[float]], float]:
    """A step's parts, [compute, bandwidth] each, and the host's seconds."""
    work = Recording("test", passes, SMALL.layers).work.sum(axis=0)
    cost = CostModel(SMALL, device, whole_passes)
    parts, _ = cost.step_seconds(work)
    return dict(zip(PARTS, parts.tolist(), strict=True)), float(of_a_step(cost, work)[1])


def of_a_step(cost: CostModel, work: Any) -> tuple[Any, Any]:
    """Seconds of the device, and those that the host adds where steps follow one another."""
    parts, host = cost.step_seconds(work)
    device = parts.sum(axis=(-2, -1))
    launching = np.maximum(host.launching - device, 0)  # the rest hides behind the device's work
    return device, host.planning + launching + host.delaying + host.results


def test_costs_by_hand_compute_bound() -> None:
    """Layer 0 has 24 rows, layer 1 has 40 and finishes 16; T = 40; 32 and 88 parameters, head
    40."""
    parts, host = seconds_of(SLOW_HOST, one_pass())
    # (2 * 32 * 24 + 2 * 88 * 24) + (2 * 32 * 40 + 2 * 88 * 16) operations at 100 a second
    assert parts["products"] == pytest.approx([57.60 + 53.76, 0])
    assert parts["attention"] == pytest.approx([(4 * 4 * 24 * 40 + 4 * 4 * 16 * 40) / 100, 0])
    # keys, values and hidden state, 2 + 2 + 4 numbers of 2 bytes, at 1000 bytes a second
    assert parts["cache writes"] == pytest.approx([0, 64 * 16 / 1000])
    assert parts["candidates"] == pytest.approx([2 * 40 * 16 / 100, 0])
    assert parts["statistics"] == [0, 0]
    assert host == pytest.approx(1 + 2 * 0.5 + 0.25)


def test_costs_by_hand_bandwidth_bound() -> None:
    """Two requests read the weights once, their own keys and values each."""
    device = replace(SLOW_HOST, flops=1e9, bandwidth=10)
    parts, host = seconds_of(device, one_pass(), one_pass())
    assert parts["products"] == pytest.approx([0, 2 * 120 * 2 / 10])
    assert parts["attention"] == pytest.approx([0, 2 * (2 * 2 * 2 * 40) * 2 / 10])
    # the head's 40 weights, and 32 rows of 10 logits: written, read twice, 2 bytes each
    assert parts["candidates"] == pytest.approx([0, (80 + 32 * 10 * 6) / 10])
    assert host == pytest.approx(1 + 2 * 0.5 + 2 * 0.25)


def test_rows_that_fill_up_by_hand() -> None:
    """3 rows in layer 0, 5 in layer 1 and 2 in the window are 8 each in products, cache writes and
    the head. In a whole pass's graph they attend, too."""
    few = one_pass(rows=5, segments=[[0, 3], [1, 2]], window=2)
    parts, host = seconds_of(SLOW_HOST, few)
    assert parts["products"] == pytest.approx([2 * 2 * 120 * 8 / 100, 0])
    assert parts["attention"] == pytest.approx([4 * 4 * (3 + 2) * 40 / 100, 0])
    assert parts["cache writes"] == pytest.approx([0, (8 + 8) * 16 / 1000])
    assert parts["candidates"] == pytest.approx([2 * 40 * 8 / 100, 0])
    assert host == pytest.approx(1 + 2 * 0.5 + 0.25)
    # Logits of 8 rows are written, and those of 2 are read twice.
    parts, _ = seconds_of(replace(SLOW_HOST, flops=1e9, bandwidth=10), few)
    assert parts["candidates"] == pytest.approx([0, (80 + (8 + 2 * 2) * 10 * 2) / 10])
    # Beyond 64 rows a step is filled up to a multiple of 16.
    parts, _ = seconds_of(SLOW_HOST, one_pass(rows=65, segments=[[0, 65]], window=8))
    assert parts["products"] == pytest.approx([(2 * 2 * 32 * 80 + 2 * 88 * (80 + 8)) / 100, 0])
    whole = WholePasses(rows=8, requests=2)
    first = one_pass(rows=5, segments=[[0, 5]], window=2)
    parts, _ = seconds_of(SLOW_HOST, first, whole_passes=whole)
    assert parts["products"] == pytest.approx([2 * 2 * 120 * 8 / 100, 0])
    assert parts["attention"] == pytest.approx([2 * 4 * 4 * 8 * 40 / 100, 0])


def test_costs_of_statistics_by_hand() -> None:
    device = replace(SLOW_HOST, statistics_seconds=0.125)
    parts, host = seconds_of(device, one_pass(queries=3, tested=1))
    # (3 + 1) queries, 40 keys, 2 layers: 2 * 4 operations each at 50 a second
    assert parts["statistics"] == pytest.approx([2 * 4 * 320 / 50, 0])
    # the tested row's old query is projected once more in each layer, and 7 rows with it
    assert parts["products"] == pytest.approx([111.36 + 2 * 2 * 8 * 32 / 100, 0])
    assert host == pytest.approx(2.25 + 0.125)
    parts, _ = seconds_of(replace(device, bandwidth=10), one_pass(queries=3, tested=1))
    assert parts["statistics"] == pytest.approx([0, (80 * 2 * 14 + 320 * 2 * 16) / 10])


def test_costs_of_statistics_by_kernels_by_hand() -> None:
    """40 keys of 2 numbers in 2 layers are read in their own type, a canvas again for 32 tests."""
    device = replace(SLOW_HOST, flops=1e9, bandwidth=10, paged_statistics=True)
    for tested, looks in ((0, 1), (1, 2), (32, 2), (33, 3)):
        parts, _ = seconds_of(device, one_pass(queries=3, tested=tested))
        # 4 bytes of a position and KV head, of which there is one: written, read and added up
        assert parts["statistics"] == pytest.approx([0, (looks * 80 * 2 * 2 + 80 * 12) / 10])
    parts, _ = seconds_of(replace(device, flops=100, bandwidth=1e9), one_pass(queries=3))
    # 3 queries look at 40 keys twice in 2 layers
    assert parts["statistics"] == pytest.approx([2 * 2 * 4 * 240 / 100, 0])


def test_a_layer_without_rows_costs_nothing() -> None:
    device = replace(SLOW_HOST, flops=1e9, bandwidth=10)
    parts, host = seconds_of(device, one_pass(segments=[[1, 40]]))
    assert parts["products"] == pytest.approx([0, 120 * 2 / 10])
    assert parts["attention"] == pytest.approx([0, 320 / 10])
    assert host == pytest.approx(1 + 0.5 + 0.25)


def test_launches_hide_behind_the_device_on_a_gpu_only() -> None:
    parts, _ = seconds_of(SLOW_HOST, one_pass())
    work = sum(map(sum, parts.values()))
    for layer_seconds, added in ((work / 4, 0.0), (work, work)):
        device = replace(SLOW_HOST, asynchronous=True, layer_seconds=layer_seconds)
        assert seconds_of(device, one_pass())[1] == pytest.approx(1.25 + added)


def test_costs_of_a_whole_pass_by_hand() -> None:
    """One launch, some of the laying out saved, all 40 rows finished where eagerly 16 are."""
    device = replace(SLOW_HOST, whole_pass_saves=0.125)
    whole = WholePasses(rows=40, requests=1)
    first = one_pass(segments=[[0, 40]])
    parts, host = seconds_of(device, first, whole_passes=whole)
    assert host == pytest.approx(1 + 0.5 + 0.25 - 0.125)
    assert parts["products"] == pytest.approx([2 * 2 * 120 * 40 / 100, 0])
    assert parts["attention"] == pytest.approx([2 * 4 * 4 * 40 * 40 / 100, 0])
    assert parts["candidates"] == seconds_of(device, first)[0]["candidates"]
    later = one_pass()
    for passes, limits in (
        ([later], whole),  # rows join at layer 1
        ([first, first], WholePasses(rows=80, requests=1)),
        ([first, first], WholePasses(rows=79, requests=2)),
    ):
        eager = seconds_of(device, *passes)
        assert seconds_of(device, *passes, whole_passes=limits) == eager
    both = seconds_of(device, first, first, whole_passes=WholePasses(rows=80, requests=2))
    assert both[1] == pytest.approx(1 + 0.5 + 2 * 0.25 - 0.125)


def test_efficiency_and_factors_scale_the_device_only() -> None:
    whole, host = seconds_of(SLOW_HOST, one_pass())
    half, same = seconds_of(replace(SLOW_HOST, efficiency=0.5), one_pass())
    assert same == host
    for part in PARTS:
        assert half[part] == pytest.approx([2 * s for s in whole[part]])
    scaled, _ = seconds_of(replace(SLOW_HOST, factors={"attention": 3.0}), one_pass())
    assert scaled["attention"] == pytest.approx([3 * s for s in whole["attention"]])
    assert scaled["products"] == whole["products"]


def test_shape_of_a_config(tmp_path: Path) -> None:
    config = {"d_model": 192, "n_layers": 8, "n_heads": 6, "n_kv_heads": 2}
    config |= {"mlp_hidden_size": 512, "vocab_size": 334, "embedding_size": 384}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"architectures": ["LLaDAModelLM"]}))
    shape = shape_of(path, bytes_per_number=4)
    assert shape == ModelShape(192, 8, 6, 2, 512, 384, False, 4) == shape_of(tmp_path, 4)
    path.write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="those that are served are LLaDAModelLM"):
        shape_of(path)


def test_experts_cost_what_rows_take_of_them() -> None:
    """A row takes two of eight experts: two MLPs to compute, and to read those that any takes."""
    dense = ModelShape(width=64, layers=1, heads=4, kv_heads=4, mlp=16, vocabulary=10)
    sparse = replace(dense, experts=8, experts_per_row=2)
    expert, choosing = 3 * 64 * 16, 64 * 8
    assert sparse.product_operations(0, 5) - dense.product_operations(0, 5) == 2 * 5 * (
        expert + choosing
    )
    rows, attention = np.array([1.0, 2.0, 1000.0]), 4 * 64 * 64
    assert (dense.parameters_read(rows) == attention + expert).all()
    taken = np.array([2, 3.5, 8])  # of two rows the second takes 2 * 6 / 8 that are new
    expected = attention + choosing + taken * expert
    assert sparse.parameters_read(rows) == pytest.approx(expected)


@pytest.mark.parametrize("policy", list(POLICIES))
def test_work_of_a_recording_is_what_was_counted(policy: str) -> None:
    """At its own depth a record's row-layers are those of the engine; at four times, four times."""
    record = record_of(policy)
    for factor in (1, 4):
        recording = Recording("test", [record], factor * LAYERS)
        columns = recording.columns
        assert recording.work[:, columns.rows].sum() == factor * record["row_layers"]
        assert recording.work[:, columns.kinds].sum() == factor * record["row_layers"]
        rows = [recorded.num_rows for recorded in recording.requests[0].passes]
        assert rows == [entry["rows"] for entry in record["steps"]]
        assert recording.work[:, columns.rows.stop - 1].tolist() == rows
        for work, entry in zip(recording.work, record["steps"], strict=True):
            layers = int((work[columns.rows] > 0).sum())
            assert layers == factor * (LAYERS - entry["start_layer"])


def make_replica(recording: Recording, capacity: Capacity, keep_steps: bool = False) -> Replica:
    shape = replace(SMALL, layers=recording.layers)
    return Replica(recording, CostModel(shape, SLOW_HOST), capacity, keep_steps=keep_steps)


@given(
    policy=st.sampled_from(list(POLICIES)),
    seats=st.integers(1, 9),
    blocks=st.integers(12, 60),
    row_budget=st.integers(1, 120),
    count=st.integers(1, 14),
    in_flight=st.integers(1, 2),
    group_rows=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_every_request_has_its_passes_within_budget_seats_and_blocks(
    policy: str,
    seats: int,
    blocks: int,
    row_budget: int,
    count: int,
    in_flight: int,
    group_rows: int,
) -> None:
    recording = Recording("test", records(count, policy), 16)
    capacity = Capacity(seats, blocks, 4, few_rows(row_budget), in_flight)
    replica = make_replica(recording, capacity, keep_steps=True)
    for request in recording.requests:
        replica.submit(Job(request, 0.0))
    seen: dict[str, list[Any]] = {}
    now, ended, both = 0.0, 0, 0
    with patch.object(overlap, "GROUP_ROWS", group_rows):
        while (end := replica.begin_steps(now)) is not None:
            assert end > now
            names = [name for step in replica.in_flight for name, _ in step]
            assert len(names) == len(set(names)) <= seats, "a request is in one step at a time"
            assert len(replica.in_flight) <= in_flight
            both += len(replica.in_flight) == 2
            step = replica.in_flight[0]
            assert len(step) == 1 or sum(p.num_rows for _, p in step) <= row_budget
            for request_id, recorded in step:
                seen.setdefault(request_id, []).append(recorded)
            now = end
            ended += len(replica.end_step(now))
    assert ended == count == len(replica.done)
    assert replica.outstanding == 0
    # Request i is the i-th admitted: the queue is served in order.
    assert [seen[str(i)] for i in range(count)] == [r.passes for r in recording.requests]
    for job in replica.done:  # nobody held blocks that were not there
        holding = [j for j in replica.done if j.admitted <= job.admitted < j.ended]
        assert sum(-(-j.request.canvas // 4) for j in holding) <= blocks
        assert len(holding) <= seats
    assert replica.busy.seconds == pytest.approx(now)
    assert replica.busy.kinds.sum() == pytest.approx(now)
    device, host = of_a_step(replica.cost, np.array(replica.steps))
    assert replica.busy.parts.sum() == pytest.approx(device.sum())
    if both:
        assert replica.busy.host <= host.sum() + 1e-9
    else:
        assert replica.busy.host == pytest.approx(host.sum())


def test_two_steps_in_flight_by_hand() -> None:
    """Two requests of three passes each, 10 s on the device, 3 s before it and 2 s after: one
    after the other a pass takes 15 s, in turns the device is never idle but at both ends."""
    seconds, host = six_passes(10, in_flight=1)
    assert (seconds, host) == (6 * 15, 6 * 5)
    seconds, host = six_passes(10, in_flight=2)
    assert (seconds, host) == (3 + 6 * 10 + 2, 3 + 2)


def test_a_host_that_is_slower_than_the_device() -> None:
    """It does one thing at a time: it plans, launches for 0.5 s and takes in results."""
    assert six_passes(1, in_flight=1)[0] == 6 * (3 + 1 + 2)
    assert six_passes(1, in_flight=2)[0] == 6 * (3 + 0.5 + 2)


def six_passes(device_seconds: float, in_flight: int) -> tuple[float, float]:
    """Until all are done, and how many of these seconds the host adds."""
    record = one_pass(segments=[[0, 40]])
    record["steps"] *= 3
    recording = Recording("test", [record, record], 2)
    cost = MagicMock(spec=CostModel, columns=recording.columns)
    parts = np.zeros((len(PARTS), 2))
    parts[0, 0] = device_seconds
    host = [np.array(each) for each in (3.0, 0.5, 0.0, 2.0)]
    cost.step_seconds.return_value = parts, HostSeconds(*host)
    replica = Replica(recording, cost, Capacity(2, 100, 4, few_rows(40), in_flight))
    with patch.object(overlap, "GROUP_ROWS", 40):
        seconds = run_closed(replica, recording.requests)
    return seconds, replica.busy.host


def test_canvas_that_never_fits_is_refused() -> None:
    recording = Recording("test", records(1), 8)
    with pytest.raises(ValueError, match="never fits"):
        run_closed(make_replica(recording, Capacity(1, 1, 4, few_rows(100))), recording.requests)


def test_batch_of_one_takes_the_sum_of_its_passes() -> None:
    recording = Recording("test", records(6), 8)
    replica = make_replica(recording, Capacity(1, 100, 4, few_rows(1000)))
    seconds = run_closed(replica, recording.requests)
    device, host = of_a_step(replica.cost, recording.work)
    assert seconds == pytest.approx(device.sum() + host.sum())
    assert replica.busy.steps == len(recording.work)


def test_batching_shares_overheads_and_weights() -> None:
    """Arithmetic is not shared, and more rows are filled up by more."""
    recording = Recording("test", records(16), 8)
    cost = CostModel(replace(SMALL, layers=8), replace(SLOW_HOST, flops=1e9))
    times = [
        run_closed(
            Replica(recording, cost, Capacity(seats, 400, 4, few_rows(1000))),
            recording.requests,
        )
        for seats in (1, 4, 16)
    ]
    assert times[0] > times[1] > times[2]


def test_replicas_of_a_closed_loop_add_up() -> None:
    recording = Recording("test", records(12), 8)

    def make() -> Replica:
        return make_replica(recording, Capacity(4, 100, 4, few_rows(1000)))

    few, many = (
        closed_loop(make, recording, replicas=n, sample=5, requests=24, seed=0) for n in (5, 3000)
    )
    assert many.simulated == few.simulated == 5
    assert many.tokens == few.tokens
    totals = [outcome.summary()["tokens_per_second"] for outcome in (few, many)]
    assert totals[1] == pytest.approx(600 * totals[0])


@pytest.mark.parametrize("router", ["round-robin", "least-outstanding"])
def test_rare_arrivals_meet_an_idle_cluster(router: str) -> None:
    """With hours between them, every request takes what it takes alone, on replicas in turn."""
    recording = Recording("test", records(8), 8)
    outcome = open_loop(
        lambda: make_replica(recording, Capacity(4, 100, 4, few_rows(1000))),
        recording,
        replicas=4,
        sample=4,
        requests=16,
        rate=1e-6,
        router=router,
        seed=1,
    )
    alone = sum(of_a_step(CostModel(replace(SMALL, layers=8), SLOW_HOST), recording.work))
    # Each request was drawn as often as any other: 64 arrivals of 8 requests.
    wanted = sorted(
        float(alone[[p.index for p in request.passes]].sum()) for request in recording.requests
    )
    assert sorted(outcome.latencies) == pytest.approx(np.repeat(wanted, 8).tolist())
    tokens = sum(request.tokens for request in recording.requests)
    assert sum(outcome.tokens) == 8 * tokens


def test_load_grows_with_replicas_and_waits_with_load() -> None:
    """At the same rate a replica, more replicas serve more; at a higher rate, all wait longer."""
    recording = Recording("test", records(12), 8)

    def play(replicas: int, rate: float, router: str = "least-outstanding") -> dict[str, Any]:
        return open_loop(
            lambda: make_replica(recording, Capacity(4, 100, 4, few_rows(1000))),
            recording,
            replicas=replicas,
            sample=8,
            requests=60,
            rate=rate,
            router=router,
            seed=2,
        ).summary()

    full = closed_loop(
        lambda: make_replica(recording, Capacity(4, 100, 4, few_rows(1000))),
        recording,
        replicas=1,
        sample=1,
        requests=60,
        seed=0,
    ).summary()
    capacity = (
        60 * full["tokens_per_second"] / sum(r.tokens for _ in range(5) for r in recording.requests)
    )  # requests a second that a full replica serves
    one, eight = play(1, 0.5 * capacity), play(8, 0.5 * capacity)
    assert eight["tokens_per_second"] == pytest.approx(8 * one["tokens_per_second"], rel=0.2)
    assert eight["latency_p99"] < one["latency_p99"]  # a free replica is easier to find
    assert play(8, 2 * capacity)["latency_median"] > 2 * eight["latency_median"]
    assert eight["busy"] < play(8, 2 * capacity)["busy"] <= 1 + 1e-9
    # Round robin has fewer surprises than one replica, more than a router that looks.
    assert eight["latency_p99"] <= play(8, 0.5 * capacity, "round-robin")["latency_p99"]


def test_least_squares_without_negative_coefficients() -> None:
    rng = np.random.default_rng(0)
    columns = rng.random((60, 5)) * [1, 10, 100, 1e-3, 1]
    x = np.array([2.0, 0.0, 3.0, 50.0, 0.0])
    assert non_negative_least_squares(columns, columns @ x) == pytest.approx(x, abs=1e-6)
    # Where the plain solution is negative the best is on the boundary: no gradient points inside.
    wanted = columns @ np.array([1.0, -2.0, 3.0, 4.0, -5.0])
    found = non_negative_least_squares(columns, wanted)
    gradient = columns.T @ (columns @ found - wanted)
    assert (found >= 0).all() and (found == 0).any()
    assert (gradient[found == 0] >= -1e-9).all()
    assert gradient[found > 0] == pytest.approx(0, abs=1e-6)


def test_fit_predicts_steps_of_a_device_it_does_not_know() -> None:
    shape = replace(SMALL, layers=8)
    known = Device("test", 1e4, 1e4, 1e6, 0)
    factors = {"products": 1.5, "attention": 4.0, "candidates": 1.0, "statistics": 2.0}
    hidden = replace(
        known, step_seconds=0.3, pass_seconds=0.1, statistics_seconds=0.2, factors=factors
    )
    timed: list[tuple[Any, Any]] = []
    for policy in ("none", "elastic", "elastic-block"):
        recording = Recording("test", records(12, policy), 8)
        replica = make_replica(recording, Capacity(4, 100, 4, few_rows(1000)), keep_steps=True)
        run_closed(replica, recording.requests)
        work = np.array(replica.steps)
        timed.append((work, sum(of_a_step(CostModel(shape, hidden), work))))
    (none, elastic, check) = timed
    found = fit(
        known,
        CostModel(shape, known),
        np.concatenate([none[0], elastic[0]]),
        np.concatenate([none[1], elastic[1]]),
    )
    assert sum(of_a_step(CostModel(shape, found), check[0])) == pytest.approx(check[1], rel=1e-3)


def timed(policy: str, batch_size: int, capacity: Capacity, hidden: Device) -> Timed:
    """A setting as if the engine had run it, with steps as long as ``hidden`` says."""
    results = records(12, policy.split(",")[0])
    setting = Timed(policy, batch_size, results=results)
    replica = replay(replace(SMALL, layers=8), hidden, setting, capacity)
    seconds = sum(of_a_step(replica.cost, np.array(replica.steps)))
    setting.rows = [int(work[replica.cost.columns.rows.stop - 1]) for work in replica.steps]
    setting.seconds = [(seconds * slower).tolist() for slower in (1.0, 1.1, 0.9)]
    return setting


def test_calibration_predicts_what_it_was_not_fitted_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    capacity = Capacity(16, 100, 4, few_rows(60))
    known = Device("test", 1e4, 1e4, 1e6, 0)
    hidden = replace(known, step_seconds=0.3, pass_seconds=0.1, factors={"products": 1.5})
    settings = [
        timed(policy, batch_size, capacity, hidden)
        for policy in ("none", "interval", "elastic, paper", "elastic-block")
        for batch_size in (1, 4, 16)
    ]
    shape = replace(SMALL, layers=8)
    found = report(shape, known, settings, capacity)
    assert [row["fitted"] for row in found["settings"]].count(True) == 3
    for row in found["settings"]:
        assert row["error"] == pytest.approx(0, abs=0.01)
        assert row["spread"] == pytest.approx(0.2)
    assert "9 settings that were not fitted" in capsys.readouterr().out
    # Twice the time is half the speed: predicted to be 100% faster than it is.
    settings[-1].seconds = [[2 * s for s in steps] for steps in settings[-1].seconds]
    assert report(shape, known, settings, capacity)["settings"][-1]["error"] == pytest.approx(
        1, abs=0.02
    )
    settings[-1].rows[3] += 1
    with pytest.raises(RuntimeError, match="elastic-block, batch 16: other steps"):
        report(shape, known, settings, capacity)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "elastic.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records(10)))
    return path


def simulate(*words: str | Path) -> None:
    args = make_parser().parse_args(["simulate", *map(str, words)])
    args.function(args)


def test_command_line(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    simulate(
        run_file, "--batch-size", "1", "64", "--replicas", "1", "1000", "--sample", "2",
        "--requests", "64", "--json", out,
    )  # fmt: skip
    rows = json.loads(out.read_text())
    settings = [(row["batch_size"], row["replicas"]) for row in rows]
    assert settings == [(1, 1), (1, 1000), (64, 1), (64, 1000)]
    rates = [row["tokens_per_second_and_replica"] for row in rows]
    assert rates[2] > 5 * rates[0] > 0
    for row in rows:
        assert row["run"] == "elastic (elastic)"
        assert sum(row["shares"].values()) == pytest.approx(1)
        assert sum(row["kinds"].values()) == pytest.approx(1)
        assert row["latency_median"] <= row["latency_p99"]
    printed = capsys.readouterr().out
    assert "not measured" in printed
    assert len([line for line in printed.splitlines() if line.startswith("| elastic")]) == 4


def test_command_line_overrides_the_device(run_file: Path, tmp_path: Path) -> None:
    """A device without overheads and with twice the rates is twice as fast, exactly."""
    rates = []
    longest = max(record["canvas"] for record in records(10))
    words = ["--model", "llada-8b", "--memory", 40, "--max-num-seqs", 8, "--canvas", longest]
    planned = tmp_path / "plan.json"
    args = make_parser().parse_args(["plan", *map(str, words), "--json", str(planned)])
    args.function(args)
    (rank,) = json.loads(planned.read_text())["ranks"]
    blocks = rank["positions"] // 32
    for scale in (1, 2):
        out = tmp_path / "out.json"
        simulate(
            run_file, "--device", "h200", "--batch-size", "8", "--json", out,
            "--tflops", str(100 * scale), "--float32-tflops", str(10 * scale),
            "--bandwidth-gb", str(1000 * scale), "--efficiency", "1", "--memory-gib", "40",
            "--step-overhead-us", "0", "--layer-overhead-us", "0", "--pass-overhead-us", "0",
            "--statistics-overhead-us", "0",
        )  # fmt: skip
        (row,) = json.loads(out.read_text())
        rates.append(row["tokens_per_second"])
        assert row["shares"]["host"] == pytest.approx(0, abs=1e-9)
        # blocks of 32 positions, of which vLLM keeps one, as `bench plan` has them
        sizes = [-(-record["canvas"] // 32) for record in records(10)]
        assert row["canvases_that_fit"] == blocks * 10 // sum(sizes)
    assert rates[1] == pytest.approx(2 * rates[0])


def test_command_line_with_arrivals(run_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    simulate(run_file, "--batch-size", "4", "--replicas", "8", "--rate", "0.5", "--json", out)
    (row,) = json.loads(out.read_text())
    tokens = np.mean([len(record["token_ids"]) for record in records(10)])
    assert row["requests"] == 8 * 64
    assert row["tokens_per_second"] == pytest.approx(8 * 0.5 * tokens, rel=0.3)


def test_command_line_with_graphs_and_groups(run_file: Path, tmp_path: Path) -> None:
    """Whole passes save launches where those take long; groups of few rows do not form."""
    rates = {}
    for flags in ((), ("--whole-passes",), ("--async-scheduling",)):
        out = tmp_path / "out.json"
        simulate(
            run_file, "--batch-size", "1", "--layer-overhead-us", "5000", "--json", out, *flags
        )
        (row,) = json.loads(out.read_text())
        rates[flags] = row["tokens_per_second"]
    assert rates["--whole-passes",] > 1.5 * rates[()]
    assert rates["--async-scheduling",] == pytest.approx(rates[()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.pop("canvas"), "record 3 lacks canvas"),
        (lambda record: record["steps"][1].pop("segments"), "record 3 lacks segments"),
    ],
)
def test_record_without_rows_is_refused(run_file: Path, change: Any, message: str) -> None:
    lines = [json.loads(line) for line in run_file.read_text().splitlines()]
    change(lines[2])
    run_file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(SystemExit, match=message):
        simulate(run_file)


def test_files_and_devices_that_cannot_do(run_file: Path) -> None:
    with pytest.raises(SystemExit, match="at least one file"):
        simulate()
    with pytest.raises(SystemExit, match="--calibrate needs --model"):
        simulate(run_file, "--calibrate")
    with pytest.raises(SystemExit, match="left for canvases"):
        simulate(run_file, "--memory-gib", "17")
    run_file.write_text("not json\n")
    with pytest.raises(SystemExit, match=r"elastic\.jsonl"):
        simulate(run_file)
    run_file.write_text("")
    with pytest.raises(SystemExit, match="no passes"):
        simulate(run_file)


@pytest.mark.parametrize(
    "words", [("--rate", "0"), ("--rate", "nan"), ("--batch-size", "0"), ("--replicas", "-1")]
)
def test_impossible_loads_are_refused(
    words: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An engine with no seats or no arrivals would never end."""
    with pytest.raises(SystemExit):
        simulate("run.jsonl", *words)
    assert f"argument {words[0]}" in capsys.readouterr().err


def test_presets_are_the_vendors_figures() -> None:
    peaks = {name: (d.flops, d.bandwidth, d.memory) for name, d in DEVICES.items()}
    assert peaks == {"h100": (989e12, 3.35e12, 80e9), "h200": (989e12, 4.8e12, 141e9)}
