# SPDX-License-Identifier: Apache-2.0
"""Engines in this process, one for each model and session, over NaN-poisoned KV blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines_kept import keep_engines
from tests.qwen2_oracle import Qwen2Oracle, small_config
from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.reference.llada import HEAD
from vllm_elastic.runner.options import RUNNER_OPTIONS, RunnerOptions

EOS, MASK = 290, 291

ORACLES_DEFAULTS = {"policy": "elastic", "window": 16, "commit": "threshold"}
"""What the oracle does where a test names neither."""

RANDOM_MODELS = {
    # odd sizes on purpose: the vocabulary is no multiple of anything
    "gqa-tied": dict(d_model=128, n_heads=4, n_kv_heads=2, n_layers=5, weight_tying=True),
    "mha-head64": dict(d_model=192, n_heads=3, n_kv_heads=3, n_layers=4, weight_tying=False),
}
# Position p's logits are row p - 1's. Six heads share two; widths and vocabulary are odd.
SHIFTED = {"dream": small_config()}
# As above, and likes to end an answer.
EAGER_TO_END = {
    "eager": dict(d_model=128, n_heads=4, n_kv_heads=4, n_layers=3, weight_tying=False),
}
# As above, and is sure of much: several tokens are committed at a step.
SURE = {
    "sure": dict(d_model=128, n_heads=4, n_kv_heads=2, n_layers=4, weight_tying=False),
}


@dataclass
class Served:
    """A model in the oracle and in the engine."""

    name: str
    directory: Path
    oracle: LLaDA
    engine: object


def with_options(monkeypatch: pytest.MonkeyPatch, runner: Any, **options: Any) -> None:
    """Let a runner read other ``RunnerOptions`` than it was started with."""
    own = RunnerOptions.of_engine(runner.vllm_config)
    known = runner.vllm_config.additional_config
    monkeypatch.setitem(known, RUNNER_OPTIONS, own._replace(**options))


def random_config(**options: object) -> LLaDAConfig:
    return LLaDAConfig(
        mlp_hidden_size=224,
        vocab_size=293,
        embedding_size=320,
        max_sequence_length=256,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        mask_token_id=MASK,
        eos_token_id=EOS,
        **options,  # type: ignore[arg-type]
    )


def poison(engine: object) -> None:
    """Fill every KV block with NaN: an element that is read before it is written can't pass."""
    for cache in engine.runner.kv_caches.values():  # type: ignore[attr-defined]
        cache.fill_(float("nan"))


def make_engine(
    directory: Path, elastic_config: dict[str, Any] | None = None, **options: Any
) -> Any:
    """An engine of sixteen seats over poisoned blocks, with similarities in its records."""
    from vllm_elastic.bench.engine import BenchEngine

    engine = BenchEngine(
        directory,
        batch_size=16,
        max_model_len=256,
        similarities=True,
        elastic_config={**ORACLES_DEFAULTS, **(elastic_config or {})},
        **{"kv_cache_memory_bytes": 64 << 20, **options},
    )
    poison(engine)
    return engine


@pytest.fixture(scope="session", autouse=True)
def _engines_are_kept() -> None:
    keep_engines()


@pytest.fixture(scope="session", autouse=True)
def _errors_are_believed() -> Iterator[None]:
    """vLLM reads a config again, two seconds later, before it believes that it is wrong."""
    from vllm.transformers_utils import repo_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repo_utils, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Served]]:
    """A random model by name, loaded once."""
    loaded: dict[str, Served] = {}

    def load(name: str) -> Served:
        if name not in loaded:
            directory = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            oracle: LLaDA
            if name in SHIFTED:
                oracle = Qwen2Oracle(SHIFTED[name], seed=3)
            else:
                options = (RANDOM_MODELS | EAGER_TO_END | SURE)[name]
                oracle = LLaDA.random(random_config(**options), seed=3)
            if name in EAGER_TO_END:
                oracle.weights[HEAD][EOS] *= 2.5
            if name in SURE:
                oracle.weights[HEAD] *= 3
            oracle.save_pretrained(directory)
            loaded[name] = Served(name, directory, oracle, make_engine(directory))
        return loaded[name]

    yield load
