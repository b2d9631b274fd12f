# SPDX-License-Identifier: Apache-2.0
"""Prometheus counters of denoising, beside vLLM's own on ``/metrics``."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from prometheus_client import REGISTRY, Counter, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from vllm_elastic.engine.attachments import EndedRequest

_LABELS = ("model_name", "engine", "policy")
_SECONDS_TO_COMMIT = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SECONDS_A_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_STEP_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class _Counters(Collector):
    """All counters as one collector: vLLM unregisters those with a name like its own at each start.

    An engine that is made later in this process goes on counting in the same ones.
    """

    def __init__(self) -> None:
        self.requests = Counter(
            "vllm:elastic_requests",
            "Admitted requests that ended, aborted ones included.",
            _LABELS,
            registry=None,
        )
        self.denoising_steps = Counter(
            "vllm:elastic_denoising_steps",
            "Denoising steps of ended requests; a replayed step counts once.",
            _LABELS,
            registry=None,
        )
        self.passes = Counter(
            "vllm:elastic_passes",
            "Forward passes of ended requests: first, full, window, refresh, replay.",
            (*_LABELS, "kind"),
            registry=None,
        )
        self.row_layers = Counter(
            "vllm:elastic_row_layers",
            "Rows computed in ended requests, summed over layers.",
            _LABELS,
            registry=None,
        )
        self.full_row_layers = Counter(
            "vllm:elastic_full_row_layers",
            "The same if every step had recomputed the whole canvas.",
            _LABELS,
            registry=None,
        )
        self.steps_per_request = Histogram(
            "vllm:elastic_request_denoising_steps",
            "Denoising steps of a request.",
            _LABELS,
            buckets=_STEP_BUCKETS,
            registry=None,
        )
        self.first_commit_seconds = Histogram(
            "vllm:elastic_request_first_commit_seconds",
            "From admission to the first committed token, shown or not.",
            _LABELS,
            buckets=_SECONDS_TO_COMMIT,
            registry=None,
        )
        self.seconds_per_token = Histogram(
            "vllm:elastic_request_seconds_per_token",
            "From admission to the end by tokens of an answer that ended by itself.",
            _LABELS,
            buckets=_SECONDS_A_TOKEN,
            registry=None,
        )
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        for metric in vars(self).values():
            yield from metric.collect()


@functools.cache
def _counters() -> _Counters:
    return _Counters()


def count_ended(record: EndedRequest) -> None:
    """Add one request to the counters."""
    counters = _counters()
    labels = {
        "model_name": record["model_name"],
        "engine": record["engine"],
        "policy": record["policy"],
    }
    counters.requests.labels(**labels).inc()
    counters.denoising_steps.labels(**labels).inc(record["denoising_steps"])
    counters.row_layers.labels(**labels).inc(record["row_layers"])
    counters.full_row_layers.labels(**labels).inc(record["full_row_layers"])
    counters.steps_per_request.labels(**labels).observe(record["denoising_steps"])
    if record["first_commit_seconds"] is not None:
        counters.first_commit_seconds.labels(**labels).observe(record["first_commit_seconds"])
    if record["seconds_per_token"] is not None:
        counters.seconds_per_token.labels(**labels).observe(record["seconds_per_token"])
    for kind, count in record["passes"].items():
        counters.passes.labels(**labels, kind=kind).inc(count)
