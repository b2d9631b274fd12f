# SPDX-License-Identifier: Apache-2.0
"""On a card: the host waits for nothing while it queues a pass.

On a CPU ``test_transfers`` counts the operators that would wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.device import ON_CARD

from .conftest import Served
from .driver import Driver, prompt_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ON_CARD, reason="a CPU is never waited for"),
]

KNOBS: list[dict[str, Any]] = [
    {"policy": "none"},
    {"policy": "dual-cache", "block_length": 4},
    {"policy": "interval", "interval": 3},
    {"policy": "elastic", "gamma": 0.9},
    {"policy": "elastic-block"},
]


def test_a_pass_is_queued_without_waiting(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(serve("gqa-tied"))
    start, passes = driver.engine.runner.start, 0

    def watched(plans: Any) -> Any:
        nonlocal passes
        passes += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(plans)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for round_ in ("kernels are compiled", "watched"):
        if round_ == "watched":
            monkeypatch.setattr(driver.engine.runner, "start", watched)
        for nth, knobs in enumerate(KNOBS):
            driver.add(prompt_of(20 + nth, nth), 20, {"temperature": 0.8, "seed": nth}, **knobs)
            driver.add(prompt_of(20 + nth, nth), 20, **knobs)
        driver.run()
        driver.take_records()
    assert passes > 5
