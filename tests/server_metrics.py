# SPDX-License-Identifier: Apache-2.0
"""What a running server says of itself at ``/metrics``."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from vllm_elastic.bench.server import ServerProcess

# vLLM's own names. A request is waiting while no KV blocks are free for it.
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
CACHE_USAGE = "vllm:kv_cache_usage_perc"
CACHE_CONFIG = "vllm:cache_config_info"


class ServerMetrics(Mapping[str, float]):
    """One reading of all metrics: values by name, summed over what differs in labels only.

    A name that the server does not have is a KeyError and no zero: what vLLM renames must not
    look like an idle server.

    Args:
        text: in Prometheus' text format; ValueError where it is not.
    """

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append(sample)

    def __getitem__(self, name: str) -> float:
        return self.total(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._samples)

    def __len__(self) -> int:
        return len(self._samples)

    def total(self, name: str, **labels: str) -> float:
        """Sum over the samples that have these labels; 0 where none of the metric's has.

        Raises:
            KeyError: there is no such metric at all.
        """
        samples = self._samples[name]
        return sum((s.value for s in samples if labels.items() <= s.labels.items()), 0.0)

    def label(self, name: str, label: str) -> str:
        """What the metric's first sample says under a label.

        Raises:
            KeyError: no such metric, or no such label.
        """
        return self._samples[name][0].labels[label]


def read_metrics(server: ServerProcess, timeout_seconds: float = 60.0) -> ServerMetrics:
    """The server's metrics now.

    Raises:
        OSError: the server does not answer; a TimeoutError when it takes longer than that.
    """
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=timeout_seconds) as answer:
        return ServerMetrics(answer.read().decode())
