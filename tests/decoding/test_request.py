# SPDX-License-Identifier: Apache-2.0
"""A request driven to its end by a random model, under every policy: what must always hold."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from tests.decoding.fake_model import (
    END_TOKENS,
    CheckedCache,
    FakeModel,
    Pass,
    Scenario,
    Trace,
    drive,
    fingerprint,
    quiet,
    scenarios,
)
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, MeasuredDrift
from vllm_elastic.decoding.plan import NO_BLOCKS, PassResult
from vllm_elastic.decoding.request import NotFiniteError

drives = settings(max_examples=200, deadline=None)
KINDS = {"first", "window", "replay", "full", "refresh"}


@drives
@given(scenarios())
def test_it_ends_within_max_tokens_steps(scenario: Scenario) -> None:
    """A request would never end, or take more forward passes than decoding one by one."""
    trace = drive(scenario)
    steps = [p for p in trace.passes if not p.replayed]
    assert trace.request.canvas.done
    assert len(steps) <= scenario.max_tokens
    # What is not a step is a pass that was replayed, or lost to a restart.
    replays = trace.request.refresh == "replay" and scenario.config.policy in (
        "elastic",
        "elastic-block",
    )
    assert len(trace.passes) <= (1 + replays) * len(steps) + 2 * trace.num_restarts
    if not replays:
        assert len(trace.passes) == len(steps)


@drives
@given(scenarios())
def test_positions_are_committed_once_or_dropped(scenario: Scenario) -> None:
    """A position would be decided twice, or be left undecided before the end."""
    trace = drive(scenario)
    committed = [position for p in trace.passes for position in p.committed]
    assert len(committed) == len(set(committed))
    new = set(range(scenario.prompt_length, scenario.length))
    assert set(committed) <= new
    assert all(position >= trace.request.canvas.end for position in new - set(committed))


@drives
@given(scenarios(restart_rates=(0.0, 0.2, 0.6)))
def test_the_answer_is_emitted_in_order_and_without_delay(scenario: Scenario) -> None:
    """A client would miss a token, see one twice, or wait for one that is finished."""
    trace = drive(scenario)
    answer, emitted = scenario.answer, []
    for p in trace.passes:
        emitted += p.emitted
        still_masked = p.masked.copy()
        still_masked[p.committed] = False
        finished = scenario.prompt_length
        while finished < len(still_masked) and not still_masked[finished]:
            finished += 1
            if answer[finished - 1 - scenario.prompt_length] in scenario.end_tokens:
                break
        assert len(emitted) == finished - scenario.prompt_length
    assert emitted == scenario.shown
    ends = [token for token in emitted if token in scenario.end_tokens]
    assert ends in ([], emitted[-1:])


@drives
@given(scenarios())
def test_commits_follow_the_rule(scenario: Scenario) -> None:
    """Replayed passes would commit, or a step would commit the wrong positions."""
    config = scenario.config
    trace = drive(scenario)
    before: dict[int, tuple[int, float]] = {}
    credits: dict[tuple[int, int], float] = {}
    for p in trace.passes:
        if p.replayed:
            assert p.emitted == []
            continue
        known = predictions_of(p)
        if config.commit == "credit" and config.tokens_per_step is None:
            known = with_credit(config, p, known, credits)
        window, probabilities = sorted(known), [known[w][0] for w in sorted(known)]
        if config.tokens_per_step is not None:
            assert len(p.committed) == min(config.tokens_per_step, len(window))
            others = [q for w, q in zip(window, probabilities, strict=True) if w not in p.committed]
            chosen = [q for w, q in zip(window, probabilities, strict=True) if w in p.committed]
            assert min(chosen) >= max(others, default=0.0)
        else:
            best = [
                w for w, q in zip(window, probabilities, strict=True) if q >= max(probabilities)
            ]
            tokens = dict(zip(p.plan.window.tolist(), p.result.token_ids.tolist(), strict=True))
            now = {w: (tokens[w], known[w][0]) for w in known}
            steady = {
                w
                for w, (token, q) in now.items()
                if config.commit == "steady" and w in before and before[w][0] == token
                if min(q, before[w][1]) >= config.steady_threshold
            }
            before = now
            assert p.committed == (sorted({*sure_of(config, known), *steady}) or best)
        assert p.committed


def predictions_of(p: Pass) -> dict[int, tuple[float, float]]:
    """Probability and entropy (0: not reported) by position."""
    probabilities, entropies = p.result.probabilities, p.result.entropies
    entropies = np.zeros(len(probabilities)) if entropies is None else entropies
    pairs = zip(probabilities.tolist(), entropies.tolist(), strict=True)
    return dict(zip(p.plan.window.tolist(), pairs, strict=True))


def with_credit(
    config: ElasticConfig,
    p: Pass,
    known: dict[int, tuple[float, float]],
    credits: dict[tuple[int, int], float],
) -> dict[int, tuple[float, float]]:
    """``known`` as the rule ``credit`` weighs it; ``credits``, by position and token, grow."""
    for holder in credits:
        credits[holder] *= config.credit_decay
    weighed = {}
    for w, token in zip(p.plan.window.tolist(), p.result.token_ids.tolist(), strict=True):
        q, entropy = known[w]
        credits[w, token] = credits.get((w, token), 0.0) + q**0.2
        odds = q * (1 + credits[w, token]) ** config.credit_weight
        weighed[w] = odds / (1 - q + odds), entropy
    return weighed


def sure_of(config: ElasticConfig, known: dict[int, tuple[float, float]]) -> list[int]:
    """Positions that the commit rule is sure of together, by this step alone, ascending."""
    probability = {w: known[w][0] for w in sorted(known)}
    if config.commit in ("threshold", "frontier", "steady", "credit", "local"):
        anchors = [w for w, q in probability.items() if q >= config.threshold]
        if config.commit in ("threshold", "credit"):
            return anchors
        if config.commit in ("frontier", "steady"):
            first = min(probability)
            open_ = probability[first] >= config.frontier_threshold
            return sorted({*anchors, *([first] if open_ else [])})
        relaxed = [w for w, q in probability.items() if q >= config.relaxed_threshold]
        near = [w for w in relaxed if any(abs(w - a) <= config.anchor_radius for a in anchors)]
        return sorted({*anchors, *near})
    ranked = sorted(probability, key=lambda w: -probability[w])
    for count in range(len(ranked), 0, -1):
        doubts = [1 - probability[w] for w in ranked[:count]]
        entropies = [known[w][1] for w in ranked[:count]]
        shared = sum(entropies) - max(entropies) if count > 1 else entropies[0]
        fits = {
            "factor": (count + 1) * doubts[-1] < config.factor,
            "frechet": 1 - sum(doubts) - doubts[-1] > config.frechet_margin,
            "entropy": shared <= config.entropy_bound,
        }
        if fits[config.commit]:
            return sorted(ranked[:count])
    return []


def whole_window(scenario: Scenario, p: Pass) -> list[int]:
    """All that a step may predict."""
    config = scenario.config
    masked = [q for q in range(p.end) if p.masked[q]]
    if config.policy == "dual-cache":
        number = (masked[0] - scenario.prompt_length) // config.block_length
        stop = scenario.prompt_length + (number + 1) * config.block_length
        return [q for q in masked if q < stop]
    return masked[: config.window]


@drives
@given(scenarios())
def test_the_window_is_the_first_masked_positions(scenario: Scenario) -> None:
    """Committed, dropped or far-off positions would be predicted."""
    for p in drive(scenario).passes:
        assert p.plan.window.tolist() == whole_window(scenario, p)


@drives
@given(scenarios())
def test_no_pass_keeps_more_rows_than_its_policy_says(scenario: Scenario) -> None:
    """A request that was admitted by what it may keep would take more memory than there is."""
    trace = drive(scenario)
    policy = trace.request.policy
    most = policy.most_saved_rows(scenario.length, scenario.num_layers)
    assert max(p.plan.num_saved_rows for p in trace.passes) <= min(most, 4 * scenario.length)


@drives
@given(scenarios())
def test_a_replay_repeats_one_drifted_window_pass(scenario: Scenario) -> None:
    """Replays would chain, follow nothing, or decide about another window."""
    trace = drive(scenario)
    for index, p in enumerate(trace.passes):
        before = trace.follows(index)
        assert p.plan.kind in KINDS
        assert (p.plan.kind == "replay") == (before is not None and before.replayed)
        if index == 0:
            assert p.plan.kind == "first"
        if p.restarted and index > 0:
            assert p.plan.kind == "full"
        if p.plan.kind == "replay":
            assert before is not None
            assert before.plan.kind == "window" or scenario.config.policy == "elastic-block"
            if p.replayed:
                assert trace.passes[index + 1].plan.kind == "full"
            assert p.plan.tested.size == 0
            assert p.plan.denoising_step == before.plan.denoising_step
            assert p.plan.window.tolist() == before.plan.window.tolist()
            assert p.plan.tokens.tolist() == before.plan.tokens.tolist()
    steps = [p.plan.denoising_step for p in trace.passes if not p.replayed]
    assert steps == list(range(len(steps)))


@drives
@given(scenarios())
def test_no_pass_reads_what_is_not_stored(scenario: Scenario) -> None:
    """Attention would read keys of nobody, or a row would join from a missing hidden state."""
    cache = CheckedCache(scenario)
    for p in drive(scenario).passes:
        if p.restarted:
            cache.forget()
        cache.run(p.plan)
        bound = p.end if scenario.config.policy == "elastic-block" else None
        committed = np.flatnonzero(~p.masked[:bound])
        assert (cache.embedded[committed] == p.plan.tokens[committed]).all(), (
            "the keys of a committed position are still those of the mask"
        )


def near(trace: Trace, p: Pass, positions: list[int]) -> set[int]:
    """The canvas positions of a pass within the request's reach of any of these."""
    reach, everywhere = trace.request.reach, range(len(p.plan.tokens))
    return {at for at in everywhere for p in positions if abs(at - p) <= reach}


@drives
@given(scenarios(policies=("elastic",), refreshes=(None, "replay")))
def test_elastic_rows(scenario: Scenario) -> None:
    """Elastic-Cache would compute other rows than the paper's, or track other positions."""
    trace = drive(scenario)
    layers, track_num = scenario.num_layers, scenario.config.track_num
    measured = np.full((layers, track_num), -1)  # most attended, this step's latest of each layer
    just_committed: list[int] = []
    drifted_layer, join_layer = -1, 0
    for p in trace.passes:
        plan = p.plan
        everything = list(range(len(plan.tokens)))
        if p.restarted:
            measured[:] = -1
            just_committed = []
        tracked = set(measured[measured >= 0].tolist()) if plan.kind == "window" else set()
        segments = [(s.join_layer, s.positions.tolist()) for s in plan.segments]
        if plan.kind == "window":
            rows = set(plan.window_rows.tolist()) | near(trace, p, just_committed) | tracked
            assert segments == [(0, sorted(rows | p.appended))]
        elif plan.kind == "replay":
            assert segments == [(join_layer, everything)]
        else:
            assert segments == [(0, everything)]
        assert plan.tested.tolist() == ([] if p.appended else sorted(tracked))
        assert isinstance(plan.measure, DriftTest)
        assert plan.measure.trackable.tolist() == (~p.masked).tolist()
        drifted_layer = -1
        if plan.tested.size:
            below = [
                layer
                for layer, s in enumerate(p.result.measured.similarities[:-1])
                if s < np.float32(scenario.config.gamma)
            ]
            drifted_layer = below[0] if below else -1
        join_layer = drifted_layer + 1
        join_layer -= join_layer % scenario.config.hidden_stride
        assert p.replayed == (drifted_layer >= 0)
        measured[plan.start_layer :] = p.result.measured.most_attended
        if not p.replayed:
            just_committed = p.committed


@drives
@given(scenarios(policies=("elastic",), refreshes=("next",)))
def test_elastic_next_refreshes_a_step_later(scenario: Scenario) -> None:
    """Stale rows would be left out, start at the wrong layer, or the drift below go untested."""
    trace = drive(scenario)
    stale_from = None
    for p in trace.passes:
        plan = p.plan
        if p.restarted:
            stale_from = None
        joins = {s.join_layer: s.positions.tolist() for s in plan.segments}
        assert not p.replayed and plan.kind != "replay"
        if plan.kind in ("window", "refresh"):
            assert (plan.kind == "refresh") == (stale_from is not None)
            assert isinstance(plan.measure, DriftTest)
            assert plan.measure.tested_layers == stale_from
            if stale_from is not None:
                everyone = joins[0] + joins.get(stale_from, [])
                assert sorted(everyone) == list(range(len(plan.tokens)))
        stale_from = None
        assert isinstance(p.result.measured, MeasuredDrift)
        if p.result.measured.similarities is not None:
            tested = p.result.measured.similarities[: scenario.num_layers - 1]
            below = np.flatnonzero(tested < np.float32(scenario.config.gamma))
            stale_from = int(below[0]) + 1 if below.size else None
            if stale_from is not None:
                stale_from -= stale_from % scenario.config.hidden_stride


@drives
@given(scenarios(policies=("elastic-block",), refreshes=("next",), restart_rates=(0.0,)))
def test_elastic_block_rows(scenario: Scenario) -> None:
    """Blocks would be refreshed in part, or rows computed that nobody asked for."""
    trace = drive(scenario)
    size = scenario.config.granularity or scenario.block_size
    just_committed: list[int] = []
    since = 0
    for p in trace.passes:
        plan = p.plan
        if plan.kind in ("window", "refresh"):
            rows = (
                set(plan.window_rows.tolist())
                | {at for at in near(trace, p, just_committed) if at < p.end}
                | set(plan.probes.tolist())
                | p.appended
            )
            at_zero = set(plan.segments[0].positions.tolist())
            assert plan.segments[0].join_layer == 0 and rows <= at_zero
            others = [set(s.positions.tolist()) for s in plan.segments[1:]]
            stale = (at_zero - rows).union(*others)
            for block in {position // size for position in stale}:
                members = set(range(block * size, min((block + 1) * size, p.end)))
                homes = [s for s in (at_zero - rows, *others) if s & members]
                assert len(homes) == 1, "a block's rows join at different layers"
                assert members - rows <= homes[0]
            assert plan.probes.size <= scenario.config.probes
        measured = isinstance(plan.measure, BlockProbe)
        assert measured == (plan.computes_everything or since >= scenario.config.measure_every)
        if isinstance(plan.measure, BlockProbe):
            assert not plan.measure.watched[plan.window_rows].any()
        if not p.replayed:
            just_committed = p.committed
        since = 1 if measured else since + 1


@drives
@given(scenarios(policies=("elastic-block",)))
def test_elastic_block_leaves_what_is_behind_the_end(scenario: Scenario) -> None:
    """Work would be done for what nobody will read. A step in which every block is stale from
    layer 0 on computes all of it, and its replay may be what finds them so."""
    for p in drive(scenario).passes:
        rows = np.concatenate([segment.positions for segment in p.plan.segments])
        if p.plan.kind in ("first", "full"):
            assert p.plan.computes_everything
        elif not (p.plan.kind == "replay" and p.plan.computes_everything):
            assert (rows < p.end).all()
        if isinstance(p.plan.measure, BlockProbe):
            assert not p.plan.measure.watched[p.end :].any()


@drives
@given(scenarios())
def test_planning_changes_nothing_until_the_result_is_in(scenario: Scenario) -> None:
    """A plan that did not fit a batch would come back different, or change under the runner."""
    trace = drive(scenario)
    for p in trace.passes:
        assert fingerprint(p.plan) == fingerprint(p.plan_before)
    request = scenario.make_request()
    model = FakeModel(scenario, np.random.default_rng(scenario.seed))
    while not request.canvas.done:
        plan = request.plan()
        state = fingerprint(request)
        assert request.plan() is plan
        assert request.plan() is plan
        assert fingerprint(request) == state
        request.finish_pass(model.run(plan))


@drives
@given(scenarios())
def test_planning_again_after_a_restart_gives_the_same_step(scenario: Scenario) -> None:
    """A preempted request would skip positions or decide about others."""
    request = scenario.make_request()
    model = FakeModel(scenario, np.random.default_rng(scenario.seed))
    while not request.canvas.done:
        plan = request.plan()
        twin = copy.deepcopy(request)
        twin.restart(NO_BLOCKS)
        again = twin.plan()
        assert again.window.tolist() == plan.window.tolist()
        assert again.tokens.tolist() == plan.tokens.tolist()
        assert again.denoising_step == plan.denoising_step
        assert again.row_layers(scenario.num_layers) == len(plan.tokens) * scenario.num_layers
        request.finish_pass(model.run(plan))


@drives
@given(scenarios())
def test_the_record_adds_up(scenario: Scenario) -> None:
    """Benchmarks would report work that was not done."""
    trace = drive(scenario)
    record, layers = trace.request.record, scenario.num_layers
    assert record.passes == len(trace.passes)
    assert record.denoising_steps == sum(not p.replayed for p in trace.passes)
    assert record.row_layers == sum(p.plan.row_layers(layers) for p in trace.passes)
    lengths = [len(p.plan.tokens) for p in trace.passes if not p.replayed]
    assert record.full_row_layers == sum(lengths) * layers
    if not scenario.config.record:
        assert record.steps == []
        return
    assert len(record.steps) == len(trace.passes)
    for entry, p in zip(record.steps, trace.passes, strict=True):
        assert entry["kind"] == p.plan.kind
        assert entry["denoising_step"] == p.plan.denoising_step
        assert entry["start_layer"] == p.plan.start_layer
        assert entry["rows"] == p.plan.num_rows
        assert entry["committed"] == p.committed


def drifting(config: dict[str, object] | None = None) -> Scenario:
    """Every test finds drift from layer 0 on."""
    return Scenario(quiet({"gamma": 2.0, "window": 2, **(config or {})}).config, drift_rate=1.0)


def test_restart_between_a_window_pass_and_its_replay() -> None:
    """The replay would run over KV blocks that belong to another request."""
    scenario = drifting()
    request = scenario.make_request()
    model = FakeModel(scenario, np.random.default_rng(0))
    request.finish_pass(model.run(request.plan()))
    assert request.plan().kind == "window"
    assert request.finish_pass(model.run(request.plan())) == []
    assert request.plan().kind == "replay"
    request.restart(NO_BLOCKS)
    plan = request.plan()
    assert (plan.kind, plan.start_layer, plan.num_rows) == ("full", 0, scenario.length)
    assert plan.tested.size == 0
    request.finish_pass(model.run(plan))
    assert request.plan().kind == "window"


def test_a_plan_has_the_kv_blocks_of_the_canvas_that_is_there() -> None:
    """A pass would write blocks that are another request's, or lack some of its own."""
    scenario = quiet({"grow_by": 8}, prompt_length=5, max_tokens=24, block_size=4)
    request = scenario.make_request()
    model, lengths = FakeModel(scenario, np.random.default_rng(0)), set()
    while not request.canvas.done:
        first = 10 * len(lengths)  # others, each time the canvas has grown
        request.restart(np.arange(first, first + 8, dtype=np.int32))
        plan = request.plan()
        lengths.add(len(plan.tokens))
        num_blocks = {13: 4, 21: 6, 29: 8}[len(plan.tokens)]
        assert plan.block_ids.tolist() == list(range(first, first + num_blocks))
        request.finish_pass(model.run(plan))
    assert len(lengths) == 3


def test_gamma_above_one_replays_every_step_but_the_first() -> None:
    """gamma 2 would not be the cache-less upper bound that the benchmarks use."""
    trace = drive(drifting({"tokens_per_step": 1}))
    kinds = [p.plan.kind for p in trace.passes]
    assert kinds == ["first"] + ["window", "replay"] * (trace.scenario.max_tokens - 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_probability_that_is_no_number_is_refused(bad: float) -> None:
    """A broken model would stream its first token for ever."""
    request = quiet({"window": 3}).make_request()
    plan = request.plan()
    probabilities = np.array([0.5, bad, 0.5])
    with pytest.raises(NotFiniteError, match="request r"):
        request.finish_pass(PassResult(np.zeros(3, dtype=np.int32), probabilities))
    assert request.canvas.masked[plan.window].all()


def test_a_nan_after_a_drift_test_is_refused_too() -> None:
    """NaN similarities with NaN candidates would be replayed as if they were drift."""
    scenario = drifting()
    request = scenario.make_request()
    model = FakeModel(scenario, np.random.default_rng(0))
    request.finish_pass(model.run(request.plan()))
    result = model.run(request.plan())
    result.probabilities[:] = np.nan
    with pytest.raises(NotFiniteError):
        request.finish_pass(result)


def test_similarities_are_kept_only_where_asked_for() -> None:
    """A server that records would keep 32 floats a pass that nobody reads."""
    for asked in (False, True):
        trace = drive(drifting({"record": True, "record_similarities": asked}))
        entries = trace.request.record.steps
        kept = [entry for entry in entries if "similarities" in entry]
        measured = [p.result.measured for p in trace.passes]
        tested = [m for m in measured if getattr(m, "similarities", None) is not None]
        assert tested
        assert len(kept) == (len(tested) if asked else 0)


@pytest.mark.parametrize("recorded", [False, True])
def test_watching_takes_nothing_out_of_the_record(recorded: bool) -> None:
    """Where both were asked for, a record was empty at the end."""
    scenario = drifting({"record": recorded})
    scenario = replace(scenario, config=replace(scenario.config, watch=True))
    model, request = FakeModel(scenario, np.random.default_rng(0)), scenario.make_request()
    taken = []
    while not request.canvas.done:
        request.finish_pass(model.run(request.plan()))
        (entry,) = request.record.take_steps()
        taken.append(entry)
    assert len(taken) == request.record.passes > request.record.denoising_steps
    assert all("canvas" in entry for entry in taken)
    assert request.record.steps == (taken if recorded else [])
    assert request.record.take_steps() == []


@drives
@given(scenarios())
def test_canvases_are_recorded_as_they_were(scenario: Scenario) -> None:
    """A page would show another pass than the one that was run."""
    config = replace(scenario.config, record=True, record_canvas=True)
    scenario = replace(scenario, config=config)
    trace, block_size = drive(scenario), scenario.make_request().validity.block_size
    assert len(trace.request.record.steps) == len(trace.passes)
    shown = {}
    ends = [p.end for p in trace.passes[1:]] + [trace.request.canvas.end]
    for entry, p, end in zip(trace.request.record.steps, trace.passes, ends, strict=True):
        canvas = entry["canvas"]
        assert canvas["length"] == len(p.plan.tokens)
        assert canvas["end"] == min(end, len(p.plan.tokens))
        found = zip(p.plan.window, p.result.token_ids, p.result.probabilities, strict=True)
        assert canvas["predicted"] == [[at, token, round(sure, 4)] for at, token, sure in found]
        spans = {at: join for start, stop, join in canvas["spans"] for at in range(start, stop)}
        rows = {at: s.join_layer for s in p.plan.segments for at in s.positions.tolist()}
        assert spans == rows
        starts = [start for start, _, _ in canvas["spans"]]
        stops = {(stop, join) for _, stop, join in canvas["spans"]}
        pairs = {(start, join) for start, _, join in canvas["spans"]}
        assert len(starts) == len(set(starts)) and not stops & pairs, "stretches are whole"
        assert canvas["block_size"] == block_size
        blocks = -(-len(p.plan.tokens) // block_size)
        assert len(canvas["stale_from"]) == blocks
        assert all(len(values) == blocks for values in canvas["judged_by"].values())
        shown |= {at: token for at, token, _ in canvas["predicted"]}
        for at in entry["committed"]:  # the last prediction of a position is what it gets
            assert shown[at] == scenario.answer[at - scenario.prompt_length]
    assert json.loads(json.dumps(trace.request.record.steps)) == trace.request.record.steps


def test_canvases_say_what_the_next_pass_refreshes() -> None:
    """What a verdict leaves stale is what the pass behind it computes, from that layer on."""
    knobs = {"policy": "elastic-block", "granularity": 4, "block_drift": 0.05, "record": True}
    scenario = quiet({**knobs, "record_canvas": True, "window": 4}, max_tokens=24, drift_rate=0.5)
    steps = drive(scenario).request.record.steps
    refreshed = 0
    for before, after in itertools.pairwise(steps):
        judged = before["canvas"]["judged_by"]
        if not judged:  # a step that measures nothing
            assert set(before["canvas"]["stale_from"]) == {scenario.num_layers}
            continue
        costs = np.multiply(judged["attention"], judged["drift"])
        stale = before["canvas"]["stale_from"]
        assert any(layer < scenario.num_layers for layer in stale) == (costs.sum() > 0.05)
        joins = dict.fromkeys(range(scenario.length), scenario.num_layers)
        for start, stop, join in after["canvas"]["spans"]:
            joins |= dict.fromkeys(range(start, stop), join)
        for at, join in joins.items():
            assert join <= stale[at // 4]
            refreshed += join == stale[at // 4] < scenario.num_layers
    assert refreshed


def test_canvases_are_kept_only_where_asked_for() -> None:
    """A plain server, and a benchmark that shows nothing, would pay for it."""
    for knobs in ({}, {"record": True}, {"record_canvas": True}):
        steps = drive(drifting(knobs)).request.record.steps
        assert bool(steps) == ("record" in knobs) and not any("canvas" in s for s in steps)


def test_all_at_once_with_an_end_in_the_middle() -> None:
    """Tokens behind the end that were committed in the same step would be emitted."""
    ends = frozenset(END_TOKENS)
    config = {"policy": "none", "threshold": 0.0}
    request = quiet(config, max_tokens=5, end_tokens=ends).make_request()
    tokens = np.array([7, 6, END_TOKENS[1], 5, END_TOKENS[0]], dtype=np.int32)
    assert request.finish_pass(PassResult(tokens, np.ones(5))) == [7, 6, END_TOKENS[1]]
    assert request.canvas.done
