# SPDX-License-Identifier: Apache-2.0
"""Weights that are loaded in place of others, and loads that fail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device import ON_CARD
from tests.quantised import quantise
from vllm_elastic.reference import LLaDA

from .conftest import RANDOM_MODELS, Served, make_engine, random_config
from .driver import Driver, assert_nothing_left, prompt_of
from .test_oracle import compare, request

pytestmark = pytest.mark.engine

CASES = list(itertools.product([1, 6], ["block", "none"]))


@pytest.fixture(params=list(RANDOM_MODELS))
def served(request: pytest.FixtureRequest, serve: Callable[[str], Served]) -> Iterator[Served]:
    """Has its own weights again afterwards."""
    served = serve(request.param)
    yield served
    reload(served, weights_path=str(served.directory))


def reload(served: Served, **source: Any) -> None:
    served.engine.llm.collective_rpc("reload_weights", kwargs=source)  # type: ignore[attr-defined]


def equals_oracle(served: Served) -> None:
    results = served.engine.run([request(*case) for case in CASES])  # type: ignore[attr-defined]
    compare(served, CASES, results)


def test_all_weights_are_others(served: Served, tmp_path: Path) -> None:
    """A tied head's too: a CPU multiplies by a packed copy of it, which no load fills."""
    oracle = LLaDA.random(random_config(**RANDOM_MODELS[served.name]), seed=9)
    oracle.save_pretrained(tmp_path)
    reload(served, weights_path=str(tmp_path))
    equals_oracle(Served(f"other {served.name}", tmp_path, oracle, served.engine))
    reload(served, weights_path=str(served.directory))
    equals_oracle(served)


def test_a_load_that_finds_nothing_changes_nothing(served: Served, tmp_path: Path) -> None:
    config = served.engine.runner.model_config  # type: ignore[attr-defined]
    before = config.model, config.revision
    with pytest.raises(Exception, match="missing"):
        reload(served, weights_path=str(tmp_path / "missing"))
    assert (config.model, config.revision) == before
    equals_oracle(served)


def test_a_load_that_ends_half_way(served: Served) -> None:
    """Requests end with an error, and the engine lives on, until there are whole weights again."""

    def torn() -> Iterator[tuple[str, torch.Tensor]]:
        for number, (name, weight) in enumerate(served.oracle.weights.items()):
            if number == 9:
                raise OSError("the disk is gone")
            yield name, weight + 1

    driver = Driver(served)
    running = driver.add(prompt_of(20, 1), 24, tokens_per_step=1)
    driver.step()
    with pytest.raises(OSError, match="the disk is gone"):
        reload(served, weights_iterator=torn())
    late = driver.add(prompt_of(9, 2), 12)
    driver.run()
    assert driver.finished == {running: "error", late: "error"}
    assert_nothing_left(driver)
    reload(served)
    equals_oracle(served)


@pytest.mark.skipif(ON_CARD, reason="a GPU reloads them")
def test_quantised_weights_on_a_cpu_are_refused(
    serve: Callable[[str], Served], tmp_path: Path
) -> None:
    quantise(serve("gqa-tied").directory, tmp_path / "int8", "int8")
    engine = make_engine(tmp_path / "int8", dtype="bfloat16")
    with pytest.raises(ValueError, match="quantised weights cannot be reloaded on a CPU"):
        engine.llm.collective_rpc("reload_weights")
    (result,) = engine.run([request(6, "block")])
    assert result["token_ids"]
