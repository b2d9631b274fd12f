# SPDX-License-Identifier: Apache-2.0
"""Every `LLM` of a test session is kept to its end.

Freeing one takes the process's parallel groups with it, whenever the garbage collector gets to it,
and then the next one cannot start. They are eager unless a test says otherwise: compiling takes
seconds for each, and is tested where it matters.
"""

from __future__ import annotations

import functools
import gc
from typing import Any

from tests.device import ON_CARD

_engines: list[Any] = []


def keep_engines() -> None:
    """Make `LLM` remember its instances; calling it again does nothing."""
    from vllm import LLM

    if hasattr(LLM.__init__, "_kept"):
        return
    make = LLM.__init__

    @functools.wraps(make)
    def kept(self: Any, *args: Any, **kwargs: Any) -> None:
        _engines.append(self)
        kwargs.setdefault("enforce_eager", True)
        if ON_CARD:  # each asks for nine tenths of it to be free, though it takes less than one
            kwargs.setdefault("gpu_memory_utilization", 0.2)
        make(self, *args, **kwargs)

    kept._kept = True  # type: ignore[attr-defined]
    LLM.__init__ = kept


def let_go(engine: Any) -> None:
    """Free the weights and the cache of a large one, which stays as an empty shell.

    Args:
        engine: a ``BenchEngine``; it cannot run any more.
    """
    runner = engine.runner
    for module in runner.model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.new_empty(0)
        module.__dict__.pop("cpu_linear", None)  # vLLM's packed copy of a weight, on CPUs
    runner.kv_caches.clear()
    gc.collect()


def end_ranks(engine: Any) -> None:
    """End the processes of one with several ranks, which would stay beside the next one's.

    Its core is left alone: vLLM's ``engine_core.shutdown`` takes the groups of this process, which
    are not its own, and every other engine here would fail at its next pass.

    Args:
        engine: a ``BenchEngine``; it cannot run any more.
    """
    engine.llm.llm_engine.engine_core.engine_core.model_executor.shutdown()
