# SPDX-License-Identifier: Apache-2.0
"""Where the time of a pass goes, part by part."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from vllm_elastic.bench.pass_time import clock

PARTS = ("products", "attention", "cache writes", "statistics", "head", "batch", "scheduler")


def places() -> dict[str, list[tuple[Any, str]]]:
    """The functions whose time each part is: where they are, and their names there."""
    from vllm_elastic.models import layer_pass
    from vllm_elastic.models.hidden_states import HiddenStateCache
    from vllm_elastic.runner import runner
    from vllm_elastic.runner.batch import PassLayout
    from vllm_elastic.runner.compiled_layer import CompiledLayer
    from vllm_elastic.runner.graphed_pass import PassInputs
    from vllm_elastic.runner.head import Head
    from vllm_elastic.runner.row_order import RowOrder
    from vllm_elastic.runner.statistics.pass_statistics import MeasuringStatistics
    from vllm_elastic.runner.statistics.recorder import PassRecorder

    return {
        "products": [
            (layer_pass, "project"),
            (layer_pass, "finish"),
            (CompiledLayer, "__call__"),
        ],
        "attention": [(layer_pass.LayerAttention, "attend")],
        "cache writes": [
            (layer_pass.LayerAttention, "write"),
            (HiddenStateCache, "write"),
            (HiddenStateCache, "read"),
        ],
        "statistics": [
            (runner, "statistics_of"),
            (MeasuringStatistics, "before"),
            (PassRecorder, "save_queries"),
            (MeasuringStatistics, "after"),
            (MeasuringStatistics, "results"),
        ],
        "head": [(Head, "predict")],
        "batch": [
            (RowOrder, "of"),
            (PassLayout, "put_rows"),
            (PassLayout, "_metadata"),
            (PassInputs, "lay_out"),
        ],
    }


@contextlib.contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of ``PARTS`` while the context is open; each part is waited for.

    Of a part inside another one the time is its own alone.
    """
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started, before = clock(), sum(seconds.values())
            try:
                return function(*args, **kwargs)
            finally:
                inside = sum(seconds.values()) - before
                seconds[name] += clock() - started - inside

        return wrapper

    saved = []
    for name, functions in places().items():
        for owner, attribute in functions:
            original = vars(owner)[attribute]
            saved.append((owner, attribute, original))
            if isinstance(original, classmethod):
                setattr(owner, attribute, classmethod(timed(name, original.__func__)))
            else:
                setattr(owner, attribute, timed(name, original))
    try:
        yield seconds
    finally:
        for owner, attribute, original in saved:
            setattr(owner, attribute, original)
