# SPDX-License-Identifier: Apache-2.0
"""What goes between host and device in a pass, counted on a CPU by the operators that do it.

Every transfer to a device starts with a tensor made of host data (``lift_fresh``), every one back
ends in an array (``numpy()``). Where host and device are one, nothing is copied, but both are made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_elastic.runner.batch import BatchBuilder

from .conftest import Served
from .driver import Driver, prompt_of
from .test_oracle import request

pytestmark = pytest.mark.engine


class Operators(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", [["released-high", "paper-low"], ["block", "block-fine"]])
def test_one_upload_a_pass(
    names: list[str], serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would be sent a dozen small pageable copies a pass, five for each plan that tests."""
    engine: Any = serve("gqa-tied").engine
    run, finish = engine.runner.run, BatchBuilder.finish
    passes: list[tuple[int, int, int]] = []
    calls: list[int] = []

    def counted(plans: Any) -> Any:
        with Operators() as seen:
            results = run(plans)
        passes.append((seen.counts["lift_fresh"], calls.pop(), len(plans)))
        return results

    def kept(builder: BatchBuilder) -> None:
        calls.append(len(builder._calls))
        finish(builder)

    monkeypatch.setattr(BatchBuilder, "finish", kept)
    monkeypatch.setattr(engine.runner, "run", counted)
    engine.run([request(index, name) for index in range(8) for name in names])
    assert max(plans for _, _, plans in passes) == 16
    for made, calls, _ in passes:
        # vLLM's attention metadata has two tensors for the host itself.
        assert made == 2 * calls


BUDGET = {
    "none": {"first": 278, "full": 276},
    "dual-cache": {"first": 278, "window": 276, "full": 276},
    "elastic-block": {"first": 370, "window": 394, "refresh": 426},
}
"""Operators of a pass of one request in a model of 5 layers, its head and statistics included. Keys
of blocks that are not neighbours take ten more to read."""


@pytest.mark.parametrize("policy", BUDGET)
def test_operators_of_a_pass(
    policy: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each is a launch, on a small model their overhead is the time: a change that adds
    some has to say so here."""
    driver = Driver(serve("gqa-tied"))
    knobs: Any = {"policy": policy, "window": 16, "block_length": 16}
    # What the upload's buffer has to grow for it has grown for then.
    driver.add(prompt_of(45, 3), 64, **knobs)
    driver.run()
    run = driver.engine.runner.run
    most: Counter[str] = Counter()

    def counted(plans: Any) -> Any:
        with Operators() as seen:
            results = run(plans)
        most[plans[0].kind] = max(most[plans[0].kind], seen.counts.total())
        return results

    monkeypatch.setattr(driver.engine.runner, "run", counted)
    driver.add(prompt_of(45, 3), 64, **knobs)
    driver.run()
    driver.take_records()
    assert most.keys() == BUDGET[policy].keys()
    for kind, count in most.items():
        assert count <= BUDGET[policy][kind], f"{kind}: {count}"
