# SPDX-License-Identifier: Apache-2.0
"""Passes by compiled layers against the same passes run eagerly, bit for bit."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch._dynamo.utils import counters
from vllm.config import CompilationMode

from tests.device import ON_CARD
from tests.quantised import FORMATS, quantise
from vllm_elastic.engine import optimisations
from vllm_elastic.engine.optimisations import compiles
from vllm_elastic.models.registry import FAMILIES
from vllm_elastic.runner import runner as runner_module
from vllm_elastic.runner.compiled_layer import CompiledLayer
from vllm_elastic.runner.executor import CompiledExecutor, EagerExecutor
from vllm_elastic.runner.options import RunnerOptions

from .checked_passes import CheckedExecutor, run_by
from .conftest import Served, make_engine, poison, with_options
from .driver import Driver
from .random_families import save_family
from .schedules import Schedule, play, schedules, the_same_always
from .test_oracle import CONFIGS, compare, request
from .test_quantised import formats

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(ON_CARD, reason="layers are compiled on CPUs"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler"),
]

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada" / "checkpoint"


def compiled(served: Served) -> CompiledExecutor:
    runner = served.engine.runner  # type: ignore[attr-defined]
    with torch.inference_mode():
        return CompiledExecutor(runner.model, runner.max_chunk_rows + 32)


@pytest.fixture(scope="module")
def checked(serve: Callable[[str], Served]) -> Callable[[str], CheckedExecutor]:
    """By a model's name, compiled once."""
    made: dict[str, CheckedExecutor] = {}

    def make(name: str) -> CheckedExecutor:
        if name not in made:
            served = serve(name)
            made[name] = CheckedExecutor(served.engine.runner, compiled(served))  # type: ignore[attr-defined]
        return made[name]

    return make


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many layers ran compiled."""
    seen: Counter[str] = Counter()
    call = CompiledLayer.__call__

    def counted(layer: CompiledLayer, *args: Any) -> torch.Tensor:
        seen["layers"] += 1
        return call(layer, *args)

    monkeypatch.setattr(CompiledLayer, "__call__", counted)
    yield seen


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(
        runner_module.logger, "warning", lambda line, *args: lines.append(line % args)
    )
    return lines


def graphs_compiled() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_passes_by_compiled_layers_are_the_eager_ones(
    serve: Callable[[str], Served],
    checked: Callable[[str], CheckedExecutor],
    layers_run: Counter[str],
) -> None:
    """Full passes, windows, refreshes and replays, of several requests, in changing batches; of
    models whose layers have other sizes, in one process."""
    names: set[str] = set()

    @the_same_always(12)
    @given(schedule=schedules())
    def check(schedule: Schedule) -> None:
        names.add(schedule.model)
        driver = Driver(serve(schedule.model))
        poison(driver.engine)
        with run_by(serve(schedule.model), checked(schedule.model)):
            play(driver, schedule)

    check()
    seen = sum((checked(name).passes for name in names), Counter[str]())
    for kind in ("join later", "join at one layer", "chunks", "measured", "tested"):
        assert seen[kind] > 10, seen
    assert layers_run["layers"] > 100


@pytest.mark.parametrize("model", ["gqa-tied", pytest.param("dream", marks=pytest.mark.slow)])
def test_against_the_oracle(
    model: str,
    serve: Callable[[str], Served],
    checked: Callable[[str], CheckedExecutor],
    layers_run: Counter[str],
) -> None:
    """Token for token and pass for pass, all configurations in one batch; nothing is compiled once
    more on the way."""
    served, executor = serve(model), checked(model)
    cases = list(itertools.product([1, 6, 11], CONFIGS))
    poison(served.engine)
    before = graphs_compiled()
    with run_by(served, executor):
        results = served.engine.run([request(*case) for case in cases])  # type: ignore[attr-defined]
    compare(served, cases, results)
    assert graphs_compiled() == before
    assert layers_run["layers"] > 0


def test_in_bfloat16(layers_run: Counter[str]) -> None:
    """What is fused is rounded in between, as it is written. This engine compiles at its start."""
    engine = make_engine(TINY, dtype="bfloat16", enforce_eager=False)
    served = Served("tiny", TINY, None, engine)  # type: ignore[arg-type]
    assert isinstance(engine.runner._executor, CompiledExecutor)
    executor = CheckedExecutor(engine.runner, engine.runner._executor)
    policies = ("elastic", "elastic-block", "dual-cache", "none")
    asked = {"prompt": "Reverse : a b c d e f g", "max_tokens": 48, "elastic_window": 4}
    with run_by(served, executor):
        engine.run([asked | {"elastic_policy": policy} for policy in policies])
    for kind in ("measured", "tested", "join later"):
        assert executor.passes[kind], executor.passes
    assert layers_run["layers"] > 0


@pytest.mark.parametrize("family", ["illada"])
@pytest.mark.slow
def test_other_families(family: str, tmp_path: Path, layers_run: Counter[str]) -> None:
    oracle = save_family(family, tmp_path)
    served = Served(family, tmp_path, oracle, make_engine(tmp_path))
    executor = CheckedExecutor(served.engine.runner, compiled(served))  # type: ignore[attr-defined]
    with run_by(served, executor):
        served.engine.run([request(index, "block") for index in (1, 6)])  # type: ignore[attr-defined]
    assert layers_run["layers"] > 0


@pytest.mark.parametrize("name", formats(*FORMATS))
@pytest.mark.slow
def test_quantised_weights(
    name: str, serve: Callable[[str], Served], tmp_path: Path, layers_run: Counter[str]
) -> None:
    """Their kernels take scales and packed weights, which are a layer's own as well."""
    directory = tmp_path / name
    quantise(serve("gqa-tied").directory, directory, name)
    engine = make_engine(directory, dtype="bfloat16", enforce_eager=False)
    served = Served(name, directory, None, engine)  # type: ignore[arg-type]
    executor = CheckedExecutor(engine.runner, engine.runner._executor)
    with run_by(served, executor):
        engine.run([request(6, "block")])
    assert executor.passes["join at one layer"]
    assert layers_run["layers"] > 0


def test_layers_that_are_quantised_otherwise(
    serve: Callable[[str], Served], tmp_path: Path, warned: list[str]
) -> None:
    """One function can't be all layers'; passes are eager and right."""
    directory = tmp_path / "int8"
    left = [f"model.transformer.blocks.0.{part}" for part in ("ff_proj", "up_proj", "ff_out")]
    quantise(serve("gqa-tied").directory, directory, "int8", left=left, ignore=left)
    engine = make_engine(directory, dtype="bfloat16", enforce_eager=False)
    assert isinstance(engine.runner._executor, EagerExecutor)
    assert len(warned) == 1
    (result,) = engine.run([request(6, "block")])
    assert result["token_ids"]


def test_other_weights_are_taken_up(
    serve: Callable[[str], Served], checked: Callable[[str], CheckedExecutor]
) -> None:
    """Weights are inputs of the compiled code, and so are vLLM's packed copies of them."""
    served = serve("gqa-tied")
    runner = served.engine.runner  # type: ignore[attr-defined]
    executor = checked("gqa-tied")
    asked = [request(6, "block")]
    with run_by(served, executor):
        (before,) = served.engine.run(asked)  # type: ignore[attr-defined]
        weights = {
            name: 1.5 * weight if "blocks" in name and weight.ndim == 2 else weight
            for name, weight in served.oracle.weights.items()
        }
        runner.reload_weights(iter(weights.items()))
        (other,) = served.engine.run(asked)  # type: ignore[attr-defined]
        runner.reload_weights(weights_path=str(served.directory))
        (after,) = served.engine.run(asked)  # type: ignore[attr-defined]
    assert before["token_ids"] == after["token_ids"] != other["token_ids"]


# The check at start.


def test_a_layer_with_a_constant_of_its_own_is_noticed(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve("mha-head64")
    block = served.engine.runner.model.blocks[2]  # type: ignore[attr-defined]
    monkeypatch.setattr(block.mlp_norm, "variance_epsilon", 1e-2)
    with pytest.raises(RuntimeError, match="the numbers of layer 2 would change"):
        compiled(served)


def test_keys_are_looked_at_too(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes into the cache is no output of a layer."""
    served = serve("gqa-tied")
    block = served.engine.runner.model.blocks[2]  # type: ignore[attr-defined]
    project = type(block).project

    def other(self: Any, x: torch.Tensor, positions: torch.Tensor) -> Any:
        q, k, v = project(self, x, positions)
        return q, k + self.of_keys, v

    for each in served.engine.runner.model.blocks:  # type: ignore[attr-defined]
        monkeypatch.setattr(each, "of_keys", 0.0, raising=False)
    monkeypatch.setattr(type(block), "project", other)
    monkeypatch.setattr(block, "of_keys", 1e-2)
    with pytest.raises(RuntimeError, match="the numbers of layer 2 would change"):
        compiled(served)


def test_few_rows_a_step(serve: Callable[[str], Served]) -> None:
    """Fewer than it is compiled with."""
    runner = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    with torch.inference_mode():
        assert CompiledExecutor(runner.model, 8)


# At start.


_NO_HEADERS = """#!/bin/sh
case "$*" in *--version*) exec g++ --version;; esac
echo "main.cpp:1:10: fatal error: Python.h: No such file or directory" >&2
exit 1
"""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(None, "No working C++ compiler found"), (_NO_HEADERS, "fatal error: Python.h")],
)
def test_without_a_compiler_passes_are_eager(
    compiler: str | None,
    reason: str,
    serve: Callable[[str], Served],
    monkeypatch: pytest.MonkeyPatch,
    warned: list[str],
    tmp_path: Path,
) -> None:
    """One line in the log, and requests are served."""
    served = serve("mha-head64")
    runner = served.engine.runner  # type: ignore[attr-defined]
    path = tmp_path / "compiler"
    if compiler is not None:
        path.write_text(compiler)
        path.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing is compiled
    with_options(monkeypatch, runner, compiles=True)
    monkeypatch.setattr(runner, "_executor", runner._executor)
    monkeypatch.setattr(runner, "_compiling", None)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(path))}):
        assert runner.compile_layers() == 0.0
    assert isinstance(runner._executor, EagerExecutor)
    (line,) = warned
    assert reason in line and "--enforce-eager" in line and "\n" not in line
    (result,) = served.engine.run([request(6, "block")])  # type: ignore[attr-defined]
    assert result["token_ids"]


def test_the_worker_compiles_where_flags_say_so(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch, warned: list[str]
) -> None:
    runner = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    monkeypatch.setattr(runner, "_executor", runner._executor)
    assert not RunnerOptions.of_engine(runner.vllm_config).compiles  # tests' engines are eager
    assert runner.compile_layers() == 0.0
    assert isinstance(runner._executor, EagerExecutor)
    with_options(monkeypatch, runner, compiles=True)
    monkeypatch.setattr(runner, "_compiling", None)
    runner.warming_up_model()  # vLLM's CPU worker, before it sizes the KV cache
    executor = runner._executor
    assert isinstance(executor, CompiledExecutor)
    assert runner.compile_layers() > 0.0
    assert runner._executor is executor
    assert not warned


def config_of(**options: Any) -> Any:
    given = dict(eager=False, mode=None, level=2, ranks=1, adapters=None, family="LLaDAModelLM")
    assert options.keys() <= given.keys()
    given |= options
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=given["eager"], architecture=given["family"]),
        lora_config=given["adapters"],
        optimization_level=given["level"],
        parallel_config=SimpleNamespace(tensor_parallel_size=given["ranks"]),
        compilation_config=SimpleNamespace(mode=given["mode"]),
    )


@pytest.mark.parametrize(
    ("options", "expected", "said"),
    [
        ({}, True, 0),
        ({"mode": CompilationMode.VLLM_COMPILE, "level": 0}, True, 0),
        ({"eager": True}, False, 0),
        ({"level": 0}, False, 0),
        ({"mode": CompilationMode.NONE}, False, 0),
        ({"ranks": 2}, False, 1),
        ({"adapters": object()}, False, 1),
        ({"family": "LLaDAMoEModelLM"}, False, 1),
        ({"family": "LLaDAMoEModelLM", "eager": True}, False, 0),
    ],
)
def test_flags(
    options: dict[str, Any], expected: bool, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asked for nothing is told why; who switched it off is not."""
    lines: list[str] = []
    monkeypatch.setattr(optimisations.logger, "info", lambda line, *_: lines.append(line))
    assert compiles(config_of(**options)) is expected
    assert len(lines) == said


def test_a_gpu_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False)
    monkeypatch.setattr(optimisations, "current_platform", platform)
    assert not compiles(config_of())


def test_experts_alone_are_not_alike() -> None:
    assert [name for name, family in FAMILIES.items() if not family.compiles] == ["LLaDAMoEModelLM"]
