# SPDX-License-Identifier: Apache-2.0
"""Random schedules of random requests, and playing them in an engine step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st

from vllm_elastic.config import ALGORITHMS
from vllm_elastic.decoding.policies import POLICIES

from .driver import Driver, prompt_of

PROMPT_LENGTHS = [1, 7, 31, 32, 33, 60, 90]  # KV blocks have 32 positions
CANVAS_LENGTHS = [1, 5, 8, 16, 24]
BLOCK_LENGTH = 8


def the_same_always(count: int) -> settings:
    """So many examples, the same in every run, and a failure shown as it came."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
    )


@dataclass(frozen=True)
class Ask:
    """A request, all that its answer may depend on."""

    prompt_length: int
    prompt_seed: int
    max_tokens: int
    knobs: tuple[tuple[str, Any], ...]
    sampling: tuple[tuple[str, Any], ...]

    @property
    def policy(self) -> str:
        return str(dict(self.knobs)["policy"])

    def add(self, driver: Driver) -> str:
        prompt = prompt_of(self.prompt_length, self.prompt_seed)
        return driver.add(prompt, self.max_tokens, dict(self.sampling), **dict(self.knobs))


@dataclass(frozen=True)
class Arrival:
    """A request in a schedule.

    Attributes:
        step: at which it comes.
        patience: steps until it is aborted; None: never.
        mid_pass: it is aborted while the pass runs, not before the step.
    """

    ask: Ask
    step: int
    patience: int | None = None
    mid_pass: bool = False


@dataclass(frozen=True)
class Schedule:
    """What happens to an engine, step by step, and how little it may do in one.

    Attributes:
        model: of those that the engine tests serve.
        arrivals: in their order within a step.
        row_budget: rows of a step, and of a row chunk of a canvas that has more.
        places: requests running at a time.
        resets: steps before which all running requests lose their KV blocks.
    """

    model: str
    arrivals: tuple[Arrival, ...]
    row_budget: int
    places: int
    resets: frozenset[int]


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
        reason: vLLM's finish reason; None: aborted.
        record: the scheduler's record; None: aborted before it was admitted.
        canvas: the scheduler's canvas; None as above.
    """

    tokens: list[int]
    reason: str | None
    record: Any
    canvas: Any


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    max_tokens = draw(st.sampled_from(CANVAS_LENGTHS))
    knobs: dict[str, Any] = {
        "policy": draw(st.sampled_from(list(POLICIES))),
        "window": draw(st.sampled_from([1, 3, 16])),
        "block_length": BLOCK_LENGTH,
    }
    if knobs["policy"] == "elastic":
        knobs["gamma"] = draw(st.sampled_from([0.0, 0.75, 0.9, 1.1]))
        knobs["statistic"] = draw(st.sampled_from(["released", "paper"]))
        knobs["track_num"] = draw(st.sampled_from([1, 3]))
        knobs["refresh"] = draw(st.sampled_from(["replay", "next"]))
    if knobs["policy"] == "elastic-block":
        # Requests of one batch whose statistics are put together.
        knobs["granularity"] = draw(st.sampled_from([3, 8, 32]))
        knobs["probes"] = draw(st.sampled_from([1, 4]))
        knobs["measure_every"] = draw(st.sampled_from([1, 2]))
        knobs["attention_stride"] = draw(st.sampled_from([1, 4]))
    commits = draw(st.sampled_from(["threshold", "rank", "steps", "alg"]))
    if commits == "steps" and max_tokens % BLOCK_LENGTH == 0:
        knobs["steps"] = max_tokens // BLOCK_LENGTH * draw(st.sampled_from([2, 3]))
        knobs["remasking"] = draw(st.sampled_from(["low_confidence", "random"]))
    elif commits == "alg" and knobs["policy"] != "dual-cache":
        knobs["alg"] = draw(st.sampled_from(ALGORITHMS))
        knobs["alg_temp"] = draw(st.sampled_from([0.0, 0.3]))
        knobs["steps"] = draw(st.sampled_from([None, 1, max_tokens]))
    elif commits == "rank":
        knobs["tokens_per_step"] = draw(st.sampled_from([1, 2, 5]))
    else:
        knobs["threshold"] = draw(st.sampled_from([0.2, 0.9]))
    sampling: dict[str, Any] = {}
    if draw(st.booleans()) or knobs.get("remasking") == "random" or "alg" in knobs:
        sampling["seed"] = draw(st.sampled_from([-7, 0, 3]))  # vLLM takes -1 for none
        sampling["temperature"] = draw(st.sampled_from([0.5, 1.3]))
        sampling["top_p"] = draw(st.sampled_from([1.0, 0.8]))
    return Ask(
        draw(st.sampled_from(PROMPT_LENGTHS)),
        draw(st.integers(0, 3)),
        max_tokens,
        tuple(knobs.items()),
        tuple(sampling.items()),
    )


@st.composite
def schedules(draw: st.DrawFn, resets: bool = False) -> Schedule:
    arrival = st.builds(
        Arrival,
        asks(),
        st.sampled_from([0, 0, 1, 2, 4, 7, 15]),
        st.sampled_from([None] * 8 + [0, 1, 3, 6]),
        st.booleans(),
    )
    return Schedule(
        draw(st.sampled_from(["gqa-tied", "eager", "dream"])),
        tuple(draw(st.lists(arrival, min_size=2, max_size=12))),
        row_budget=draw(st.sampled_from([24, 64, 150, 500])),
        places=draw(st.sampled_from([2, 5, 16])),
        resets=frozenset(draw(st.sets(st.integers(1, 20), min_size=1))) if resets else frozenset(),
    )


@dataclass
class _Play:
    driver: Driver
    canvases: dict[str, Any] = field(default_factory=dict)

    @contextlib.contextmanager
    def limits(self, row_budget: int, places: int) -> Iterator[None]:
        """Small steps; and keeps the canvases, which the scheduler drops when a request ends."""
        scheduler, runner = self.driver.engine.scheduler, self.driver.engine.runner
        before = scheduler.limits, scheduler.max_num_active_reqs
        chunk, new_canvas = runner.max_chunk_rows, scheduler._begin

        def keep(request: Any, block_ids: Any) -> Any:
            canvas = new_canvas(request, block_ids)
            self.canvases[request.request_id.split("-")[0]] = canvas
            return canvas

        scheduler.limits = replace(scheduler.limits, rows=row_budget)
        runner.max_chunk_rows = row_budget
        scheduler.max_num_active_reqs, scheduler._begin = places, keep
        try:
            yield
        finally:
            scheduler.limits, scheduler.max_num_active_reqs = before
            runner.max_chunk_rows = chunk
            del scheduler._begin


def abort_in_pass(driver: Driver, name: str) -> None:
    """What vLLM does when a client hangs up meanwhile: the abort is taken after the pass."""
    core = driver.llm_engine.engine_core.engine_core
    inner = [r for r in core.scheduler.requests if r.split("-")[0] == name]
    core.aborts_queue.put_nowait(inner)


def play(driver: Driver, schedule: Schedule) -> list[Outcome]:
    """Run a schedule to its end; one outcome for each arrival, in order."""
    state = _Play(driver)
    names: dict[int, str] = {}
    last = max(arrival.step for arrival in schedule.arrivals)
    # The order within a step is the schedule's; every request takes a few dozen steps at most.
    with state.limits(schedule.row_budget, schedule.places):
        for step in range(5000):
            after_step: list[str] = []
            for index, arrival in enumerate(schedule.arrivals):
                if arrival.step == step:
                    names[index] = arrival.ask.add(driver)
                if arrival.patience is not None and arrival.step + arrival.patience == step:
                    if arrival.mid_pass:
                        abort_in_pass(driver, names[index])
                        after_step.append(names[index])
                    else:
                        driver.llm_engine.abort_request([names[index]])
            if step in schedule.resets:
                driver.llm_engine.reset_prefix_cache(reset_running_requests=True)
            driver.step()
            driver.llm_engine.abort_request(after_step)
            if step >= last and not driver.llm_engine.has_unfinished_requests():
                break
        else:
            raise AssertionError("the engine did not come to an end")
    records = driver.take_records()
    return [
        Outcome(
            driver.tokens[name],
            driver.finished.get(name),
            records.get(name),
            state.canvases.get(name),
        )
        for name in (names[index] for index in range(len(schedule.arrivals)))
    ]
