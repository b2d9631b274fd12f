# SPDX-License-Identifier: Apache-2.0
"""The tests that need a card, on one that is simulated (``tests.simulated_card``).

In processes of their own: torch and vLLM are told of the card once and for all.
"""

from __future__ import annotations

import re
import shutil

import pytest

from tests.device import ON_CARD, ON_SECOND
from tests.own_process import printed_by

pytestmark = [
    pytest.mark.skipif(ON_CARD or ON_SECOND, reason="one is enough"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="a device's guard is compiled"),
]


def passed(*arguments: str) -> int:
    """How many tests passed; none failed."""
    said = printed_by("pytest", "-p", "tests.simulated_card", "-q", "-n0", *arguments)
    found = re.search(r"(\d+) passed", said)
    return int(found[1]) if found else 0


@pytest.mark.parametrize(
    ("which", "count"),
    [
        ("waits or flags4 or flags1 and float32", 4),
        pytest.param("", 11, marks=pytest.mark.long),
    ],
    ids=["some", "all"],
)
@pytest.mark.slow
def test_starts(which: str, count: int) -> None:
    """By vLLM's GPU worker: with layers' graphs and whole passes; of all, eager, with overlapping
    steps, and with as large a KV cache as it finds room for."""
    files = "tests/engine/test_card_starts.py", "tests/engine/test_card_waits.py"
    assert passed(*files, "-k", which) == count


@pytest.mark.long
def test_graphs() -> None:
    """Captured and replayed by what a card has for it, against the oracle; faults are seen."""
    files = ("tests/engine/test_graphs.py", "tests/engine/test_graphed_passes.py")
    assert passed(*files, "-k", "gqa-tied and oracle or wishes or tensors or fault") == 25


SIZES = "--width 64 --layers 3 --heads 2 --mlp 96 --vocabulary 300 --max-num-batched-tokens 256"


@pytest.mark.long
@pytest.mark.parametrize("ways", [(), ("--whole-passes",)])
def test_bench_card(ways: tuple[str, ...]) -> None:
    passes = "--batch-size 1 2 --canvas 48 --window 16 --repeats 2"
    said = printed_by(
        "tests.simulated_card", "vllm_elastic.bench", "card", *SIZES.split(), *passes.split(), *ways
    )
    executors = {line.split(" | ")[0].strip("| ") for line in said.splitlines() if "full" in line}
    assert executors == {"eager", "graphs", *(["whole passes"] if ways else [])}


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "files",
    [
        ("test_oracle.py", "test_dream.py", "test_sampling.py"),
        ("test_graphs.py", "test_graphed_passes.py", "test_overlap.py", "test_families.py"),
        ("test_adapters.py", "test_images.py", "test_grammar.py"),
    ],
    ids=["oracle", "graphs", "more"],
)
def test_engines(files: tuple[str, ...]) -> None:
    names = [f"tests/engine/{name}" for name in files]
    # Experts' kernels are CUDA builds' own.
    assert passed(*names, "--timeout=1500", "-k", "not moe and not experts") > 10
