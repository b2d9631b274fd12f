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


def _places() -> dict[str, list[tuple[Any, str]]]:
    from vllm_elastic.models import transformer
    from vllm_elastic.models.hidden_states import HiddenStateCache
    from vllm_elastic.runner.batch import BatchBuilder
    from vllm_elastic.runner.head import Head
    from vllm_elastic.runner.row_order import RowOrder
    from vllm_elastic.runner.statistics.recorder import PassRecorder
    from vllm_elastic.runner.statistics.saved_rows import SavedRows
    from vllm_elastic.runner.statistics.statistics import Statistics

    return {
        "products": [(transformer, "_project"), (transformer, "_finish")],
        "attention": [(transformer, "_attend")],
        "cache writes": [
            (transformer, "_write"),
            (HiddenStateCache, "write"),
            (HiddenStateCache, "read"),
        ],
        "statistics": [
            (SavedRows, "__init__"),
            (Statistics, "before"),
            (PassRecorder, "save_queries"),
            (Statistics, "after"),
            (Statistics, "results"),
        ],
        "head": [(Head, "predict")],
        "batch": [(RowOrder, "of"), (BatchBuilder, "lay_out"), (BatchBuilder, "finish")],
    }


@contextlib.contextmanager
def parts_timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of ``PARTS`` while the context is open; each part is waited for."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = clock()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += clock() - started

        return wrapper

    saved = []
    for name, places in _places().items():
        for owner, attribute in places:
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
