# SPDX-License-Identifier: Apache-2.0
"""A model that answers plans at random, a driver for one request, and a cache that checks both.

The fake model always predicts the same token for a position: its *answer*. So what a request has
to emit is known beforehand, whatever the policy, the order of the commits or the restarts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import strategies as st

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.commits import COMMIT_RULES
from vllm_elastic.decoding.measurement import (
    BlockProbe,
    DriftTest,
    Measured,
    MeasuredDrift,
    MeasuredProbes,
)
from vllm_elastic.decoding.plan import NO_BLOCKS, PassPlan, PassResult
from vllm_elastic.decoding.policies import POLICIES
from vllm_elastic.decoding.request import DenoisingRequest
from vllm_elastic.decoding.traits import DecodingTraits

MASK = 99
PROMPT_TOKEN = 50
END_TOKENS = (1, 2)
VOCABULARY = 8  # tokens 0 .. 7, so that end tokens are likely


@dataclass(frozen=True)
class Scenario:
    """One request and all the chances that it meets."""

    config: ElasticConfig
    prompt_length: int = 3
    max_tokens: int = 8
    num_layers: int = 3
    block_size: int = 4
    logits_shift: int = 0
    end_tokens: frozenset[int] = frozenset()
    drift_rate: float = 0.3
    restart_rate: float = 0.0
    seed: int = 0

    @property
    def length(self) -> int:
        return self.prompt_length + self.max_tokens

    @property
    def answer(self) -> np.ndarray:
        """int32 [max_tokens]: what the model predicts, position by position."""
        rng = np.random.default_rng([self.seed, 1])
        return rng.integers(0, VOCABULARY, self.max_tokens, dtype=np.int32)

    @property
    def shown(self) -> list[int]:
        """The answer up to and with its first end token: what has to be emitted."""
        answer = self.answer.tolist()
        ends = [i for i, token in enumerate(answer) if token in self.end_tokens]
        return answer[: ends[0] + 1] if ends else answer

    def make_request(self) -> DenoisingRequest:
        return DenoisingRequest(
            "r",
            [PROMPT_TOKEN] * self.prompt_length,
            self.max_tokens,
            self.config,
            DecodingTraits(self.num_layers, MASK + 1, MASK, logits_shift=self.logits_shift),
            end_token_ids=self.end_tokens,
            block_size=self.block_size,
        )


def scenarios(
    policies: tuple[str, ...] = tuple(POLICIES),
    restart_rates: tuple[float, ...] = (0.0, 0.2),
    refreshes: tuple[str | None, ...] = (None, "replay", "next"),
) -> st.SearchStrategy[Scenario]:
    """Small canvases, every policy, extreme knobs as likely as the usual ones."""
    knobs = st.fixed_dictionaries(
        {
            "policy": st.sampled_from(policies),
            "window": st.integers(1, 12) | st.just(100),
            "threshold": st.sampled_from([0.0, 0.5, 0.9, 1.0]),
            "commit": st.sampled_from(list(COMMIT_RULES)),
            "factor": st.sampled_from([0.0, 0.75, 2.0, 10.0]),
            "frechet_margin": st.sampled_from([0.0, 0.25, 1.0]),
            "steady_threshold": st.sampled_from([0.0, 0.5, 1.0]),
            "credit_decay": st.sampled_from([0.0, 0.8, 1.0]),
            "credit_weight": st.sampled_from([0.0, 0.7, 10.0]),
            "frontier_threshold": st.sampled_from([0.0, 0.5, 1.0]),
            "relaxed_threshold": st.sampled_from([0.0, 0.5, 1.0]),
            "anchor_radius": st.integers(0, 4) | st.just(100),
            "entropy_bound": st.sampled_from([0.0, 0.5, 2.0]),
            "gamma": st.sampled_from([0.0, 0.5, 0.9, 2.0]),
            "track_num": st.integers(1, 4),
            "tokens_per_step": st.none() | st.integers(1, 5) | st.just(100),
            "block_length": st.integers(1, 12) | st.just(100),
            "refresh": st.sampled_from(refreshes),
            "interval": st.integers(1, 6),
            "probes": st.integers(1, 4),
            "measure_every": st.integers(1, 3),
            "reach": st.none() | st.integers(0, 3) | st.just(100),
            "rows_per_pass": st.sampled_from([0, 5, 20, 100]),
            "block_drift": st.sampled_from([0.0, 0.1, 1.0]),
            "slack": st.sampled_from([0.0, 0.1, 1.0]),
            "hidden_stride": st.sampled_from([1, 2, 3]),
            "granularity": st.none() | st.integers(1, 9),
            "grow_by": st.none() | st.integers(0, 9),
            "grow_ahead": st.integers(0, 12),
            "record": st.booleans(),
        }
    )
    return st.builds(
        Scenario,
        config=knobs.map(_by_whole_blocks).map(ElasticConfig.from_dict),
        prompt_length=st.integers(1, 9),
        max_tokens=st.integers(1, 24),
        num_layers=st.integers(1, 5),
        block_size=st.sampled_from([1, 2, 4, 32]),
        logits_shift=st.sampled_from([0, 1]),
        end_tokens=st.sampled_from([frozenset(), frozenset(END_TOKENS[:1]), frozenset(END_TOKENS)]),
        drift_rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        restart_rate=st.sampled_from(restart_rates),
        seed=st.integers(0, 2**32 - 1),
    )


def _by_whole_blocks(knobs: dict[str, Any]) -> dict[str, Any]:
    """Where text blocks are predicted an answer grows by some of them."""
    if knobs["policy"] == "dual-cache" and knobs["grow_by"]:
        return knobs | {"grow_by": knobs["grow_by"] * knobs["block_length"]}
    return knobs


class FakeModel:
    """Reports what a pass reports: random but for the predicted tokens."""

    def __init__(self, scenario: Scenario, rng: np.random.Generator) -> None:
        self.scenario = scenario
        self.rng = rng
        self.not_stored = np.arange(scenario.num_layers) % scenario.config.hidden_stride > 0

    def run(self, plan: PassPlan) -> PassResult:
        scenario, rng = self.scenario, self.rng
        count = len(plan.window)
        probabilities = rng.random(count)
        if rng.random() < 0.5:  # ties, and values right at the threshold
            probabilities = rng.choice([0.1, 0.5, 0.9, 1.0], count)
        answer = scenario.answer[plan.window - scenario.prompt_length]
        measured: Measured | None = None
        if isinstance(plan.measure, DriftTest):
            measured = self._drift(plan.measure, plan.start_layer)
        elif isinstance(plan.measure, BlockProbe):
            measured = self._blocks(plan.measure, len(plan.tokens))
        entropies = None
        if scenario.config.commit == "entropy":
            entropies = rng.choice([0.0, 0.1, 0.5, 1.0], count)
        return PassResult(answer, probabilities, entropies, measured=measured)

    def _drift(self, measure: DriftTest, start_layer: int) -> MeasuredDrift:
        scenario, rng = self.scenario, self.rng
        candidates = np.flatnonzero(measure.trackable)
        num_tracked = min(measure.track_num, len(candidates))
        shape = scenario.num_layers - start_layer, measure.track_num
        most_attended = np.full(shape, -1, dtype=np.int32)
        for row in most_attended:
            row[:num_tracked] = rng.choice(candidates, num_tracked, replace=False)
        if not measure.tested.size:
            return MeasuredDrift(most_attended)
        gamma = scenario.config.gamma
        similarities = np.full(scenario.num_layers, gamma + 0.1, dtype=np.float32)
        similarities[rng.random(scenario.num_layers) < 0.1] = gamma  # no drift
        drifted = rng.random(scenario.num_layers) < scenario.drift_rate
        similarities[drifted] = gamma - 0.1
        similarities[self.not_stored] = np.nan
        return MeasuredDrift(most_attended, similarities[: measure.tested_layers])

    def _blocks(self, measure: BlockProbe, length: int) -> MeasuredProbes:
        scenario, rng = self.scenario, self.rng
        attention = rng.random(length)
        if rng.random() < 0.5:  # ties, and blocks that nobody looks at
            attention = rng.choice([0.0, 0.0, 0.5, 1.0], length)
        found = MeasuredProbes((attention / max(attention.sum(), 1.0)).astype("f4"))
        if measure.probes.size:
            shape = (measure.probes.size, scenario.num_layers)
            found.probe_drift = (2 * scenario.drift_rate * rng.random(shape)).astype("f4")
            found.probe_drift[:, 0] = 0.0
            found.probe_drift[:, self.not_stored] = 0.0
        return found


@dataclass
class Pass:
    """A pass and what came of it."""

    plan: PassPlan
    plan_before: PassPlan  # a deep copy from before the pass
    result: PassResult
    restarted: bool  # at some time since the pass before
    masked: np.ndarray  # before the pass
    end: int  # before the pass
    committed: list[int]  # canvas positions
    emitted: list[int]
    appended: set[int]  # canvas positions that are new, and that no pass has computed

    @property
    def replayed(self) -> bool:
        """Its candidates were thrown away."""
        return not self.committed


@dataclass
class Trace:
    """All that happened to a request."""

    scenario: Scenario
    request: DenoisingRequest
    passes: list[Pass] = field(default_factory=list)
    num_restarts: int = 0

    @property
    def emitted(self) -> list[int]:
        return [token for p in self.passes for token in p.emitted]

    def follows(self, index: int) -> Pass | None:
        """The pass before, unless the request was restarted in between."""
        return None if index == 0 or self.passes[index].restarted else self.passes[index - 1]


def drive(scenario: Scenario) -> Trace:
    """Run a request to its end, or for far more passes than any request may need."""
    rng = np.random.default_rng([scenario.seed, 2])
    model = FakeModel(scenario, rng)
    trace = Trace(scenario, scenario.make_request())
    request = trace.request
    while not request.canvas.done and len(trace.passes) < 4 * scenario.max_tokens + 20:
        restarted = False
        for _ in range(2):  # before and after planning
            if rng.random() < scenario.restart_rate:
                request.restart(NO_BLOCKS)
                trace.num_restarts += 1
                restarted = True
            plan = request.plan()
        before = copy.deepcopy(plan)
        masked, end = request.canvas.masked.copy(), request.canvas.end
        computed = len(trace.passes[-1].plan.tokens) if trace.passes else 0
        appended = set(range(computed, len(plan.tokens))) if computed and not restarted else set()
        if trace.passes and trace.passes[-1].replayed and not restarted:
            appended |= trace.passes[-1].appended
        result = model.run(plan)
        emitted = request.finish_pass(result)
        # It may have grown meanwhile.
        committed = np.flatnonzero(masked & ~request.canvas.masked[: len(masked)]).tolist()
        trace.passes.append(
            Pass(plan, before, result, restarted, masked, end, committed, emitted, appended)
        )
    return trace


class CheckedCache:
    """What the paged cache holds, by layer and position; fails where a plan reads a hole.

    Everything else that a forward pass relies on is checked here too, layer by layer.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.forget()

    def forget(self) -> None:
        """The KV blocks were given to somebody else."""
        shape = (self.scenario.num_layers, self.scenario.length)
        self.has_keys = np.zeros(shape, dtype=bool)
        self.has_hidden = np.zeros(shape, dtype=bool)
        self.embedded = np.full(self.scenario.length, -1)  # the token that layer 0 saw last

    def run(self, plan: PassPlan) -> None:
        rows: list[int] = []
        joins = [segment.join_layer for segment in plan.segments]
        assert joins == sorted(set(joins))
        for layer in range(self.scenario.num_layers):
            for segment in plan.segments:
                if segment.join_layer != layer:
                    continue
                joining = segment.positions.tolist()
                assert joining and joining == sorted(set(joining))
                assert not set(joining) & set(rows), "a position joins twice"
                if layer == 0:
                    self.embedded[joining] = plan.tokens[joining]
                else:
                    assert self.has_hidden[layer, joining].all(), "no hidden state to join from"
                rows += joining
            if not rows:
                continue
            self.has_keys[layer, rows] = True
            seen = self.has_keys[layer, : len(plan.tokens)]
            assert seen.all(), f"layer {layer} attends to keys that are not there"
            above = layer + 1
            stored = above % self.scenario.config.hidden_stride == 0
            if above < self.scenario.num_layers and stored:
                self.has_hidden[layer + 1, rows] = True
        assert set(plan.window_rows.tolist()) <= set(rows)
        assert plan.window_rows.tolist() == [p - plan.logits_shift for p in plan.window.tolist()]
        assert set(plan.tested.tolist()) <= set(plan.segments[0].positions.tolist())
        assert set(plan.probes.tolist()) <= set(plan.segments[0].positions.tolist())


def fingerprint(value: Any) -> str:
    """Equal for equal plans and requests, arrays compared in full."""
    with np.printoptions(threshold=1 << 30):
        return repr(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    names = list(getattr(value, "__slots__", ())) or list(getattr(value, "__dict__", ()))
    if names and type(value).__module__.startswith("vllm_elastic"):
        return (type(value).__name__, [(name, _plain(getattr(value, name))) for name in names])
    return value


def quiet(config: dict[str, Any] | None = None, **changes: Any) -> Scenario:
    """A scenario for readable examples: `elastic`, no drift, no restarts, no end token."""
    knobs = {"policy": "elastic", "window": 16, **(config or {})}
    return replace(Scenario(ElasticConfig.from_dict(knobs), drift_rate=0.0), **changes)
