# SPDX-License-Identifier: Apache-2.0
"""iLLaDA and LLaDA-MoE against Transformers' own modules in float32, pass for pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .agreement import agrees
from .conftest import Served, make_engine, poison
from .test_oracle import CONFIGS, ask_oracle, problems
from .transformers_oracle import FAMILIES, TransformersOracle, save_family

pytestmark = pytest.mark.engine

NAMES = ["none", "interval", "dual-cache", "released-high", "block-fine", "block-lazy-topk"]


@pytest.fixture(scope="module")
def serve_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    loaded: dict[str, Served] = {}

    def load(name: str) -> Served:
        if name not in loaded:
            directory: Path = tmp_path_factory.mktemp(name)
            oracle = save_family(name, directory)
            loaded[name] = Served(name, directory, oracle, make_engine(directory))
        return loaded[name]

    return load


def assert_equals_oracle(served: Served, cases: list[tuple[int, str]], **knobs: Any) -> None:
    """Everything the records say, against the oracle's; few near ties."""
    requests = []
    for index, name in cases:
        prompt, max_tokens = problems()[index]
        own = {f"elastic_{key}": value for key, value in (CONFIGS[name] | knobs).items()}
        requests.append({"prompt_token_ids": prompt, "max_tokens": max_tokens, **own})
    results = served.engine.run(requests)  # type: ignore[attr-defined]
    equal = []
    for (index, name), result in zip(cases, results, strict=True):
        expected = ask_oracle(served, *problems()[index], CONFIGS[name] | knobs)
        equal.append(agrees(result, expected, (served.name, index, name)))
    assert equal.count(False) <= len(cases) / 50
    kinds = {p["kind"] for result in results for p in result["steps"]}
    assert kinds >= {"first", "window", "replay", "refresh"}


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_computes_what_transformers_does(family: str, tmp_path: Path) -> None:
    oracle: TransformersOracle = save_family(family, tmp_path)
    tokens = torch.arange(3, 45)
    found = oracle.head(oracle.forward(tokens))
    torch.testing.assert_close(found, oracle.whole(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_of_16_equals_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    served = serve_family(family)
    assert_equals_oracle(served, list(itertools.product(range(12), NAMES)), grow_by=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_answers_equal_oracle(family: str, serve_family: Callable[[str], Served]) -> None:
    """Canvases of up to five pieces of 8; at each one the KV blocks begin to be filled anew."""
    served = serve_family(family)
    poison(served.engine)
    assert_equals_oracle(served, list(itertools.product(range(12), NAMES)), grow_by=8)
