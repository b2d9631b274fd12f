# SPDX-License-Identifier: Apache-2.0
"""What each refresh policy recomputes, on examples that can be checked by eye."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.decoding.fake_model import END_TOKENS, CheckedCache, Scenario, drive, quiet
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.block_history import attention_of_blocks
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, MeasuredDrift, MeasuredProbes
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.decoding.policies import POLICIES, RefreshPolicy, make_policy
from vllm_elastic.decoding.request import DenoisingRequest


def one_token_a_step(scenario: Scenario) -> Scenario:
    return replace(scenario, config=replace(scenario.config, tokens_per_step=1))


def rows_of(scenario: Scenario) -> list[list[tuple[int, list[int]]]]:
    """(join layer, positions) of every segment of every pass."""
    return [
        [(segment.join_layer, segment.positions.tolist()) for segment in p.plan.segments]
        for p in drive(scenario).passes
    ]


def step(request: DenoisingRequest, tokens: dict[int, int]) -> None:
    """Digest a pass that is sure of these positions only; the best others get token 0."""
    plan = request.plan()
    window = plan.window.tolist()
    measured = None
    if isinstance(plan.measure, DriftTest):
        shape = request.num_layers - plan.start_layer, plan.measure.track_num
        measured = MeasuredDrift(np.full(shape, -1, dtype=np.int32))
    request.finish_pass(
        PassResult(
            np.array([tokens.get(p, 0) for p in window], dtype=np.int32),
            np.array([1.0 if p in tokens else 0.0 for p in window]),
            measured=measured,
        )
    )


def probed(
    request: DenoisingRequest,
    attention: dict[int, float],
    drift: list[list[float]] | None = None,
) -> PassResult:
    """A pass that commits nothing but the first position, with these attention statistics."""
    count = len(request.plan().window)
    paid = np.zeros(request.canvas.length, dtype=np.float32)
    paid[list(attention)] = list(attention.values())
    return PassResult(
        np.zeros(count, dtype=np.int32),
        np.array([0.5] + [0.0] * (count - 1)),
        measured=MeasuredProbes(paid, None if drift is None else np.array(drift, dtype=np.float32)),
    )


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
@settings(deadline=None)
def test_attention_of_blocks(length: int, block_size: int, seed: int) -> None:
    """Against a loop over the definition, with ties and zeros."""
    rng = np.random.default_rng(seed)
    attention = (rng.integers(0, 5, length) / 8).astype(np.float32)
    watched = rng.random(length) < 0.7
    sums, best = attention_of_blocks(attention, watched, block_size)
    for block, start in enumerate(range(0, length, block_size)):
        members = [p for p in range(start, min(start + block_size, length)) if watched[p]]
        assert sums[block] == sum(attention[p] for p in members)  # eighths: no rounding
        assert best[block] == max(members, key=lambda p: attention[p], default=-1)
    assert len(sums) == len(best) == block + 1


def first_watched(plan: PassPlan) -> int:
    """The first position whose attention counts."""
    assert isinstance(plan.measure, BlockProbe)
    return int(plan.measure.watched.argmax())


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_names(name: str) -> None:
    """A policy would not be found under the name that the config allows."""
    assert POLICIES[name].name == name
    assert type(make_policy(ElasticConfig(policy=name))) is POLICIES[name]


def test_recompute_computes_everything_at_every_step() -> None:
    """The baseline of all comparisons would reuse something."""
    scenario = one_token_a_step(quiet({"policy": "none", "window": 2}, max_tokens=4))
    everything = [(0, list(range(7)))]
    assert rows_of(scenario) == [everything] * 4
    kinds = [p.plan.kind for p in drive(scenario).passes]
    assert kinds == ["first", "full", "full", "full"]


def test_elastic_window_slides_over_the_masked_positions() -> None:
    """The paper's rows: window, just committed, tracked; nothing else."""
    request = quiet({"window": 3}, prompt_length=2, max_tokens=6).make_request()
    assert request.plan().window.tolist() == [2, 3, 4]
    assert request.plan().num_rows == 8
    step(request, {3: 5})
    assert request.plan().window.tolist() == [2, 4, 5]  # 3 is a hole
    assert [s.positions.tolist() for s in request.plan().segments] == [[2, 3, 4, 5]]
    step(request, {2: 5, 5: 5})
    assert request.plan().window.tolist() == [4, 6, 7]
    assert [s.positions.tolist() for s in request.plan().segments] == [[2, 4, 5, 6, 7]]
    assert request.plan().kind == "window"


@pytest.mark.parametrize(
    ("gamma", "similarities", "expected"),
    [
        pytest.param(0.9, [1.0, 1.0, 1.0, 1.0], None, id="no-drift"),
        pytest.param(0.9, [0.8, 1.0, 1.0, 1.0], 1, id="layer-0"),
        pytest.param(0.9, [1.0, 0.8, 1.0, 0.8], 2, id="the-first-of-two"),
        pytest.param(0.9, [1.0, 1.0, 0.8, 1.0], 3, id="last-but-one"),
        pytest.param(0.9, [1.0, 1.0, 1.0, 0.8], None, id="last-layer-has-no-effect"),
        pytest.param(0.9, [0.9, 0.9, 0.9, 0.9], None, id="equal-is-no-drift"),
        pytest.param(0.0, [0.0, 0.0, 0.0, 0.0], None, id="gamma-0-never"),
        pytest.param(1.5, [1.0, 1.0, 1.0, 1.0], 1, id="gamma-above-1-always"),
        pytest.param(0.9, [0.0], None, id="one-layer-only"),
    ],
)
def test_elastic_verdict(gamma: float, similarities: list[float], expected: int | None) -> None:
    """A refresh would start at the wrong layer, or not at all (paper, algorithm 1)."""
    scenario = quiet({"gamma": gamma}, num_layers=len(similarities))
    request = scenario.make_request()
    nobody = np.full((len(similarities), 1), -1, dtype=np.int32)
    measured = MeasuredDrift(nobody, np.array(similarities, dtype=np.float32))
    assert request.policy.judge(request, request.plan(), measured) == expected


def test_interval_refreshes_on_schedule() -> None:
    """A fixed schedule would measure something, or miss a refresh."""
    scenario = one_token_a_step(quiet({"policy": "interval", "interval": 3}, max_tokens=7))
    kinds = [p.plan.kind for p in drive(scenario).passes]
    assert kinds == ["first", "window", "window", "full", "window", "window", "full"]


def test_elastic_block_refreshes_what_costs_most() -> None:
    """A block that nobody attends to, or that stands still, would be recomputed."""
    config = {"policy": "elastic-block", "probes": 2, "block_drift": 0.1, "slack": 0.1, "window": 2}
    config |= {"reach": 0, "granularity": None, "measure_every": 1}
    request = quiet(config, prompt_length=8, max_tokens=8, num_layers=4).make_request()
    assert request.plan().kind == "first"
    request.finish_pass(probed(request, {1: 0.5, 5: 0.2, 10: 0.1, 15: 0.1}))
    plan = request.plan()
    assert plan.kind == "window"
    assert plan.probes.tolist() == [1, 5], "the two most attended blocks"
    assert plan.segments[0].positions.tolist() == [1, 5, 8, 9, 10]
    # Block 0 stands still; block 1 drifts from layer 2 on.
    drift = [[0.0, 0.01, 0.01, 0.01], [0.0, 0.01, 0.6, 0.8]]
    request.finish_pass(probed(request, {2: 0.5, 6: 0.2, 11: 0.1, 14: 0.1}, drift))
    plan = request.plan()
    assert plan.kind == "refresh"
    joins = {s.join_layer: s.positions.tolist() for s in plan.segments}
    # Layer 1 is the last whose input has not drifted; position 5 is no row of the window pass.
    assert joins[1] == [4, 5, 7] and 6 in joins[0] and 4 not in joins[0]
    request.finish_pass(probed(request, {3: 0.5, 7: 0.2, 12: 0.1, 13: 0.1}, [[0.0] * 4] * 2))
    assert request.plan().kind == "window", "it has been refreshed"


def test_elastic_block_extrapolates_between_probes() -> None:
    """A block that drifts slowly would never be refreshed, or only when it is probed."""
    config = {"policy": "elastic-block", "probes": 1, "block_drift": 0.1, "window": 1, "reach": 0}
    config |= {"granularity": None, "measure_every": 1}
    request = quiet(config, prompt_length=8, max_tokens=20, num_layers=2).make_request()
    kinds, probed_blocks, computed = [], [], {0}
    for nth in range(5):
        plan = request.plan()
        kinds.append(plan.kind)
        # Block 0 drifts by 0.13 in a step, block 1 does not. Both are attended to, so the one probe
        # is in either by turns, each time at a position that is as old as the canvas.
        drift = None
        if plan.probes.size:
            probed_blocks.append(int(plan.probes[0]) // 4)
            drift = [[0.0, 0.13 * nth**0.6 if probed_blocks[-1] == 0 else 0.0]]
            computed.update(plan.segments[0].positions.tolist())
        old = set(range(8)) - computed
        request.finish_pass(probed(request, {min(old): 0.45, max(old): 0.45}, drift))
    assert probed_blocks == [0, 1, 0, 1]
    # In step 2, which probes block 1, block 0's cost at the next is 0.45 * 0.13 * 3**0.6 > 0.1.
    assert kinds == ["first", "window", "window", "refresh", "window"]


def test_elastic_block_measures_now_and_then() -> None:
    """A step between two measurements would compute probes, or a verdict would not last."""
    config = {"policy": "elastic-block", "probes": 1, "block_drift": 0.1, "window": 1, "reach": 0}
    config |= {"granularity": None, "measure_every": 3}
    request = quiet(config, prompt_length=4, max_tokens=20, num_layers=2).make_request()
    kinds, measured = [], []
    for nth in range(10):
        plan = request.plan()
        kinds.append(plan.kind)
        if plan.measure is None:
            assert not plan.probes.size
            step(request, {})
            continue
        measured.append(nth)
        # 0.04 for the first step since the probe was computed: in step 0, and 4 (a refresh).
        drift = [[0.0, 0.04 * {3: 3, 6: 2, 9: 5}[nth] ** 0.6]] if plan.probes.size else None
        request.finish_pass(probed(request, {first_watched(plan): 0.9}, drift))
    assert measured == [0, 3, 6, 9]
    # In step 3 0.9 * 0.04 * 6**0.6 is expected of step 6, and would be 0.9 * 0.04 * 4**0.6 of the
    # next; in step 6 0.9 * 0.04 * 5**0.6 of step 9.
    assert [nth for nth, kind in enumerate(kinds) if kind == "refresh"] == [4]


@pytest.mark.parametrize(
    ("rows_per_pass", "refreshed"),
    # A pass has five rows of its own: the window's, the commit's and three probes, one of which is
    # in block 0 and one in block 1. Block 1 costs most, then 0; the others have not drifted.
    [(0, []), (5, []), (7, []), (8, [1]), (10, [1]), (11, [1, 0]), (16, [1, 0])],
)
def test_elastic_block_spends_spare_rows_on_what_costs_most(
    rows_per_pass: int, refreshed: list[int]
) -> None:
    """A pass would have more rows than it should, or leave some unused that are as good as free."""
    config = {"policy": "elastic-block", "probes": 3, "block_drift": 10.0, "window": 1, "reach": 0}
    config |= {"granularity": None, "measure_every": 1, "rows_per_pass": rows_per_pass}
    request = quiet(config, prompt_length=12, max_tokens=8, num_layers=4).make_request()
    request.finish_pass(probed(request, {1: 0.5, 5: 0.2, 10: 0.1}))
    assert request.plan().kind == "window", "nothing is known to have drifted"
    drift = [[0.0, 0.0, 0.0, 0.01], [0.0, 0.01, 0.6, 0.8], [0.0] * 4]
    request.finish_pass(probed(request, {2: 0.5, 6: 0.2, 11: 0.1}, drift))
    plan = request.plan()
    assert plan.kind == ("refresh" if refreshed else "window")
    joins = {s.join_layer: s.positions.tolist() for s in plan.segments}
    assert joins[0] == [2, 6, 11, 13, 14]
    # Each joins before the first layer whose input has drifted by more than a tenth of the most.
    assert joins.get(1, []) == ([4, 5, 7] if 1 in refreshed else [])
    assert joins.get(2, []) == ([0, 1, 3] if 0 in refreshed else [])
    # The next pass finds them fresh, and has nothing else to spend rows on.
    request.finish_pass(probed(request, {}, [[0.0] * 4] * plan.probes.size))
    assert request.plan().kind == "window"


@pytest.mark.parametrize(
    ("reach", "expected"),
    [(0, [7, 8, 9]), (2, [5, 6, 7, 8, 9]), (50, list(range(12)))],
)
def test_elastic_block_computes_the_neighbours_of_commits(reach: int, expected: list[int]) -> None:
    """The hidden states that drift most would stay as they were before the commit."""
    config = {"policy": "elastic-block", "window": 2, "reach": reach}
    config["granularity"] = 4
    request = quiet(config, prompt_length=7, max_tokens=5, num_layers=2).make_request()
    result = probed(request, {})
    result.probabilities[1] = 0.1  # position 7 is committed, 8 is not
    request.finish_pass(result)
    assert request.just_committed.tolist() == [7]
    assert np.concatenate([s.positions for s in request.plan().segments]).tolist() == expected


def test_elastic_block_with_an_end_in_the_middle() -> None:
    """What stands behind it would be a neighbour, a probe or a part of what is refreshed."""
    config = {"policy": "elastic-block", "granularity": 4, "window": 7, "reach": 3, "probes": 2}
    config |= {"measure_every": 1, "block_drift": 0.0, "commit": "threshold"}
    ends = frozenset(END_TOKENS)
    scenario = quiet(config, prompt_length=7, max_tokens=13, num_layers=3, end_tokens=ends)
    request = scenario.make_request()
    request.finish_pass(probed(request, {1: 0.6, 18: 0.4}))
    assert request.plan().probes.tolist() == [1, 18]
    result = probed(request, {2: 0.5, 17: 0.5}, [[0.0, 0.0, 0.2]] * 2)
    # Position 13 is committed, and ends the answer in the middle of block 3.
    at = request.plan().window.tolist().index(13)
    result.token_ids[at], result.probabilities[at] = END_TOKENS[0], 1.0
    request.finish_pass(result)
    assert (request.just_committed.tolist(), request.canvas.end) == ([13], 14)
    # Blocks 0 and 4 are stale from layer 1 on: of these only the first one may still be shown.
    plan = request.plan()
    assert {s.join_layer: s.positions.tolist() for s in plan.segments} == {
        0: [2, 8, 9, 10, 11, 12, 13],
        1: [0, 1, 3],
    }
    assert plan.probes.tolist() == [2]
    assert isinstance(plan.measure, BlockProbe)
    assert np.flatnonzero(plan.measure.watched).tolist() == [0, 1, 3, 4, 5, 6, 7]


def test_dual_cache_text_blocks() -> None:
    """A refresh a text block, the block's rows else; the last block may be short."""
    config = {"policy": "dual-cache", "block_length": 4}
    scenario = one_token_a_step(quiet(config, prompt_length=3, max_tokens=10))
    everything = [(0, list(range(13)))]
    blocks = [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12]]
    expected = []
    for block in blocks:
        expected += [everything] + [[(0, block)]] * (len(block) - 1)
    assert rows_of(scenario) == expected
    for p in drive(scenario).passes:
        block = next(b for b in blocks if p.plan.window[0] in b)
        assert set(p.plan.window.tolist()) <= set(block)


def test_dual_cache_stays_in_its_block_until_it_is_full() -> None:
    """Blocks would be decoded out of order."""
    config = {"policy": "dual-cache", "block_length": 3}
    request = quiet(config, prompt_length=1, max_tokens=6).make_request()
    step(request, {2: 5, 3: 5})
    assert request.plan().window.tolist() == [1]
    assert [s.positions.tolist() for s in request.plan().segments] == [[1, 2, 3]]
    step(request, {1: 5})
    assert request.plan().window.tolist() == [4, 5, 6]
    assert request.plan().kind == "full"


def test_dual_cache_block_with_an_end_in_it() -> None:
    """Dropped positions of the block would be predicted, or the block's rows would change."""
    config = {"policy": "dual-cache", "block_length": 4}
    ends = frozenset(END_TOKENS)
    request = quiet(config, prompt_length=2, max_tokens=8, end_tokens=ends).make_request()
    step(request, {4: END_TOKENS[0]})
    assert request.plan().window.tolist() == [2, 3]
    assert [s.positions.tolist() for s in request.plan().segments] == [[2, 3, 4, 5]]
    step(request, {2: 5, 3: 5})
    assert request.canvas.done


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize("max_tokens", [1, 5], ids=["canvas-of-1", "canvas-of-5"])
def test_windows_and_blocks_larger_than_the_canvas(name: str, max_tokens: int) -> None:
    """Positions outside the canvas would be planned."""
    config = {"policy": name, "window": 64, "block_length": 64, "threshold": 0.0}
    trace = drive(quiet(config, max_tokens=max_tokens))
    assert len(trace.passes) == 1  # threshold 0 commits the whole window
    assert trace.emitted == trace.scenario.answer.tolist()


def test_the_policy_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/policies.md would show a policy that does not run."""
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    source = page.split("```python")[1].split("```")[0]
    names: dict[str, Any] = {"np": np, "RefreshPolicy": RefreshPolicy}
    exec(source, names)
    monkeypatch.setitem(POLICIES, "every-other", names["EveryOther"])
    scenario = quiet({"granularity": 8}, prompt_length=8, max_tokens=8)
    scenario = replace(scenario, config=replace(scenario.config, policy="every-other"))
    trace = drive(one_token_a_step(scenario))
    cache = CheckedCache(trace.scenario)
    for p in trace.passes:
        cache.run(p.plan)
    kinds = [p.plan.kind for p in trace.passes]
    assert kinds == ["first", "window"] + ["refresh", "window"] * 3
    assert trace.emitted == trace.scenario.answer.tolist()
