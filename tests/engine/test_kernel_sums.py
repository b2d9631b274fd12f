# SPDX-License-Identifier: Apache-2.0
"""Statistics by Triton's kernels inside the engine, in Triton's interpreter: the oracle's answers.

Keys lie in CPU layouts here, and the kernels' blocks are smaller than the KV cache manager's.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tests import triton_interpreter  # noqa: F401
from tests.device import ON_CARD
from vllm_elastic.attention import paged_kernels
from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.reference import LLaDA
from vllm_elastic.runner.statistics import attention_sums, memory
from vllm_elastic.runner.statistics.kernel_sums import KernelSums

from .agreement import agrees
from .conftest import RANDOM_MODELS, Served, make_engine, random_config
from .test_oracle import CONFIGS, ask_oracle, problems

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(ON_CARD, reason="all tests of engines use the kernels there"),
]

KERNELS = ["mass_kernel", "fold_kernel", "released_kernel", "paper_kernel"]
NAMES = ["released-high", "paper-high", "block", "block-fine", "next-low"]
CASES = [(*problems(6)[index], name) for index in (0, 5) for name in NAMES]


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, name: str, launches: Counter[str]) -> None:
        self._kernel, self._name, self._launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        self._launches[self._name] += 1
        return self._kernel[grid]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    sizes = staticmethod(lambda kv_cache_spec=None: [32])
    oracle = LLaDA.random(random_config(**RANDOM_MODELS["gqa-tied"]), seed=3)
    directory = tmp_path_factory.mktemp("kernels")
    oracle.save_pretrained(directory)
    importlib.import_module("vllm_elastic.engine.engine_config")  # reads the true sizes
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", sizes)
        yield Served("gqa-tied", directory, oracle, make_engine(directory, block_size=96))


@pytest.mark.parametrize("at_once", [memory.MOST_NUMBERS_AT_ONCE, 3000], ids=["all", "in-parts"])
@pytest.mark.slow
def test_equals_oracle(served: Served, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, blocks or old keys would be another request's; a plan would cost a launch."""
    engine: Any = served.engine
    launches: Counter[str] = Counter()
    for name in KERNELS:
        monkeypatch.setattr(
            paged_kernels, name, Counted(getattr(paged_kernels, name), name, launches)
        )
    monkeypatch.setattr(attention_sums, "TorchSums", KernelSums)
    monkeypatch.setattr(memory, "MOST_NUMBERS_AT_ONCE", at_once)
    # No canvas's keys are copied, let alone to float32.
    monkeypatch.setattr(KeyLayout, "read_blocks", lambda *_: pytest.fail("keys were copied"))
    run, most_plans = engine.runner.run, 0

    def counted(plans: Any) -> Any:
        nonlocal most_plans
        launches.clear()
        results = run(plans)
        kinds = {type(plan.measure) for plan in plans if plan.measure is not None}
        tested = {plan.measure.statistic for plan in plans if plan.tested.size}
        if at_once > 3000:
            expected = dict.fromkeys(["mass_kernel", "fold_kernel"], len(kinds))
            expected |= {f"{statistic}_kernel": 1 for statistic in tested}
            assert +launches == Counter(expected)
        most_plans = max(most_plans, len(plans))
        return results

    monkeypatch.setattr(engine.runner, "run", counted)
    results = engine.run(
        [
            {"prompt_token_ids": prompt, "max_tokens": max_tokens}
            | {f"elastic_{key}": value for key, value in CONFIGS[name].items()}
            for prompt, max_tokens, name in CASES
        ]
    )
    assert most_plans == len(CASES)
    for (prompt, max_tokens, name), result in zip(CASES, results, strict=True):
        expected = ask_oracle(served, prompt, max_tokens, CONFIGS[name])
        assert agrees(result, expected, (name, len(prompt)))
