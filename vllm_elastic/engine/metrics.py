# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of denoising, beside vLLM's own on ``/metrics``."""

from __future__ import annotations

import functools
from typing import Any

from prometheus_client import Counter, Histogram

_LABELS = ("model_name", "engine", "policy")
_STEP_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class _Counters:
    """Made when the first request is finished: vLLM clears the registry when an engine starts."""

    def __init__(self) -> None:
        self.requests = Counter(
            "vllm:elastic_requests", "Requests ended, aborted ones included.", _LABELS
        )
        self.denoising_steps = Counter(
            "vllm:elastic_denoising_steps",
            "Denoising steps of ended requests; a replayed step counts once.",
            _LABELS,
        )
        self.passes = Counter(
            "vllm:elastic_passes",
            "Forward passes of ended requests: first, full, window, refresh, widened, replay.",
            (*_LABELS, "kind"),
        )
        self.row_layers = Counter(
            "vllm:elastic_row_layers",
            "Rows computed in ended requests, summed over layers.",
            _LABELS,
        )
        self.full_row_layers = Counter(
            "vllm:elastic_full_row_layers",
            "The same if every step had recomputed the whole canvas.",
            _LABELS,
        )
        self.steps_per_request = Histogram(
            "vllm:elastic_request_denoising_steps",
            "Denoising steps of a request.",
            _LABELS,
            buckets=_STEP_BUCKETS,
        )


@functools.cache
def _counters() -> _Counters:
    return _Counters()


def count_finished(record: dict[str, Any]) -> None:
    """Add one ended request.

    Args:
        record: ``model_name``, ``engine``, ``policy``; ``denoising_steps``, ``row_layers``,
            ``full_row_layers``; ``passes``: number by kind.
    """
    counters = _counters()
    labels = {name: record[name] for name in _LABELS}
    counters.requests.labels(**labels).inc()
    counters.denoising_steps.labels(**labels).inc(record["denoising_steps"])
    counters.row_layers.labels(**labels).inc(record["row_layers"])
    counters.full_row_layers.labels(**labels).inc(record["full_row_layers"])
    counters.steps_per_request.labels(**labels).observe(record["denoising_steps"])
    for kind, count in record["passes"].items():
        counters.passes.labels(**labels, kind=kind).inc(count)
