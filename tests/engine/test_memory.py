# SPDX-License-Identifier: Apache-2.0
"""What a step of legal requests takes, against what the trial run at start allocated for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_bytes import LiveBytes
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.runner import candidates, head
from vllm_elastic.runner.statistics import memory, pass_statistics, torch_sums

from .conftest import EOS, MASK, Served
from .driver import Driver, prompt_of

pytestmark = pytest.mark.engine

CANVAS = 640
LOGITS, ATTENTION, SUMS = 1 << 17, 1 << 16, 1 << 14
"""A GPU's bounds, lower: so many logits and numbers of attention are few for requests like these,
as 2^25 and 2^26 are for LLaDA-8B's."""

WISHES = {"temperature": 1.0, "top_p": 0.9, "logprobs": 2}


def bound(
    monkeypatch: pytest.MonkeyPatch,
    logits: int = LOGITS,
    numbers: int = LOGITS,
    attention: int = ATTENTION,
    sums: int = SUMS,
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(candidates, "_NUMBERS_AT_ONCE", (numbers, numbers))
    monkeypatch.setattr(memory, "MOST_NUMBERS_AT_ONCE", attention)
    monkeypatch.setattr(pass_statistics, "MOST_NUMBERS_AT_ONCE", attention)
    monkeypatch.setattr(torch_sums, "_NUMBERS_AT_ONCE", attention)
    monkeypatch.setattr(memory, "SUMS_AT_ONCE", sums)


@pytest.fixture(autouse=True)
def _low_bounds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        bound(monkeypatch)
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LLaDAConfig(
        d_model=128,
        n_heads=4,
        n_kv_heads=4,
        n_layers=5,
        weight_tying=False,
        mlp_hidden_size=224,
        vocab_size=1024,
        embedding_size=1024,
        max_sequence_length=CANVAS,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        mask_token_id=MASK,
        eos_token_id=EOS,
    )
    directory = tmp_path_factory.mktemp("wide")
    LLaDA.random(config, seed=3).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine_of(directory: Path) -> Iterator[Callable[..., Driver]]:
    """An engine with so many seats and so many rows in a step."""
    made: dict[tuple[int, int], Driver] = {}

    def make(seats: int, row_budget: int) -> Driver:
        if (seats, row_budget) not in made:
            engine = BenchEngine(
                directory,
                batch_size=seats,
                row_budget=row_budget,
                max_model_len=CANVAS,
                elastic_config={"max_window": 512, "window": 32},
                kv_cache_memory_bytes=128 << 20,
                similarities=True,
            )
            made[seats, row_budget] = Driver(Served("wide", directory, None, engine))
        return made[seats, row_budget]

    yield make


def trial_bytes(driver: Driver) -> int:
    with LiveBytes() as live:
        driver.engine.runner.profile_run()
    return live.peak


def step_bytes(driver: Driver, steps: int) -> int:
    """The most that any of the next passes has alive; then the requests are aborted."""
    runner, most = driver.engine.runner, 0

    def counted(plans: Any) -> Any:
        nonlocal most
        with LiveBytes() as live:
            results = run(plans)
        most = max(most, live.peak)
        return results

    run = runner.run
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(runner, "run", counted)
        for _ in range(steps):
            driver.step()
    for name in list(driver.engine.scheduler.requests):
        driver.llm_engine.abort_request([name.split("-")[0]])
    driver.run()
    return most


def add(driver: Driver, count: int, knobs: dict[str, Any]) -> None:
    for nth in range(count):
        driver.add(prompt_of(100 + nth, nth), 500, WISHES, **knobs)


WIDE: dict[str, dict[str, Any]] = {
    "block": dict(policy="elastic-block", window=500, probes=64, granularity=4, attention_stride=1),
    "none": dict(policy="none", window=500),
    "released": dict(policy="elastic", window=500, gamma=0.9, track_num=64),
    "paper": dict(policy="elastic", window=200, statistic="paper", track_num=20, reach=3),
    "next": dict(policy="elastic", window=300, refresh="next", gamma=2.0, track_num=8),
}


SIZES = {"one": (1, 1024), "many": (8, 1024), "chunks": (1, 100)}


@pytest.mark.parametrize(
    ("seats", "row_budget", "name"),
    [
        pytest.param(
            *sizes,
            name,
            id=f"{size}-{name}",
            marks=[pytest.mark.slow] if size == "many" else [],
        )
        for (size, sizes), name in itertools.product(SIZES.items(), WIDE)
    ],
)
def test_a_step_is_within_the_trial_run(
    seats: int, row_budget: int, name: str, engine_of: Callable[..., Driver]
) -> None:
    driver = engine_of(seats, row_budget)
    allowed = trial_bytes(driver)
    add(driver, seats, WIDE[name])
    # A first pass computes a whole canvas: with many, there is one in each of the first steps.
    assert 0.2 * allowed < step_bytes(driver, 4 + 2 * seats) <= allowed


def most_rows_at_once(driver: Driver, work: Callable[[], None]) -> int:
    """That an MLP is given while something works."""
    seen = [0]

    def look(module: Any, given: tuple[Any, ...]) -> None:
        seen[0] = max(seen[0], len(given[0]))

    hooks = [b.mlp.register_forward_pre_hook(look) for b in driver.engine.runner.model.blocks]
    work()
    for hook in hooks:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("seats", "row_budget", "sizes"),
    [(2, 650, [322, 322]), (1, 100, [600]), (1, 100, [196])],
    ids=["filled up beyond the budget", "last chunk", "last of two"],
)
def test_no_pass_works_on_more_rows_at_once(
    seats: int, row_budget: int, sizes: list[int], engine_of: Callable[..., Driver]
) -> None:
    """vLLM's experts keep scratch for the most rows they have seen; graphs point to it."""
    driver = engine_of(seats, row_budget)
    tried = most_rows_at_once(driver, driver.engine.runner.profile_run)
    for nth, size in enumerate(sizes):
        driver.add(prompt_of(size - 40, nth), 40)
    taken = most_rows_at_once(driver, driver.run)
    assert row_budget < taken <= tried


TRACKING = dict(policy="elastic", window=8, gamma=0.0, track_num=64)

LOOSE: dict[str, tuple[dict[str, int], int, dict[str, Any]]] = {
    "candidates": ({"logits": 1 << 22, "numbers": 1 << 22}, 1, WIDE["none"]),
    "attention of blocks": ({"attention": 1 << 22}, 1, WIDE["block"]),
    "attention of tested rows": ({"attention": 1 << 22}, 1, WIDE["released"]),
    "sums": ({"sums": 1 << 30}, 8, TRACKING),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n == "sums" else []) for n in LOOSE]
)
def test_a_bound_that_is_not_kept_shows(name: str, engine_of: Callable[..., Driver]) -> None:
    """So each of them is needed, and the test above would see it."""
    loosened, seats, knobs = LOOSE[name]
    driver = engine_of(seats, 1024)
    allowed = trial_bytes(driver)
    with pytest.MonkeyPatch.context() as monkeypatch:
        bound(monkeypatch, **loosened)
        add(driver, seats, knobs)
        taken = step_bytes(driver, 4 + 2 * seats)
    assert taken > allowed


@pytest.mark.parametrize("name", ["block", "released", "paper", "next"])
def test_pieces_are_the_whole(name: str, engine_of: Callable[..., Driver]) -> None:
    """A pass's answers and similarities, with its attention read in pieces and at once."""
    driver, found = engine_of(1, 1024), []
    for attention, sums in ((1 << 13, 1 << 13), (1 << 26, 1 << 30)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            bound(monkeypatch, attention=attention, sums=sums)
            asked = driver.add(prompt_of(150, 1), 40, **WIDE[name] | {"window": 30})
            driver.run()
        found.append((driver.tokens[asked], driver.take_records()[asked].steps))
    (tokens, steps), (whole_tokens, whole_steps) = found
    compared = 0
    assert tokens == whole_tokens
    assert len(steps) == len(whole_steps)
    for step, whole in zip(steps, whole_steps, strict=True):
        some, all_at_once = step.pop("similarities", None), whole.pop("similarities", None)
        assert step == whole
        assert (some is None) == (all_at_once is None)
        if some is not None:
            compared += 1
            assert some == pytest.approx(all_at_once, abs=2e-6, nan_ok=True)
    assert (compared > 0) == (name != "block")
