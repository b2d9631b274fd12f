# SPDX-License-Identifier: Apache-2.0
"""``vllm serve --data-parallel-size 2``: two engines behind one endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
import pytest

from tests.server_metrics import read_metrics
from vllm_elastic.bench.server import ServerProcess

from .serving import LIMIT, a_core_each, answers_equal_oracle, seconds_until_told_and_ended, serve

ENGINES = 2
REQUESTS = 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("data_parallel") / "server.log"
    env = {"VLLM_CPU_OMP_THREADS_BIND": a_core_each()}
    options = ["--data-parallel-size", str(ENGINES), "--api-server-count", "1"]
    with serve(log, options, env) as server:
        yield server


def workers_of(server: ServerProcess) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if child.name() == "VLLM::Worker"]


def test_both_engines_answer_as_the_oracle(server: ServerProcess, row: Callable[..., None]) -> None:
    equal = answers_equal_oracle(server, REQUESTS)
    metrics = read_metrics(server)
    answered = [
        metrics.total("vllm:request_success_total", engine=str(engine)) for engine in range(ENGINES)
    ]
    assert all(answered), f"requests of each engine: {answered}"
    assert sum(answered) == metrics["vllm:elastic_requests_total"] == REQUESTS
    # By itself vLLM would bind both to the same cores where there is one NUMA node.
    cores = sorted(worker.cpu_affinity() for worker in workers_of(server))
    assert cores == sorted([int(core)] for core in a_core_each().split("|"))
    row(
        executor="mp, data parallel",
        nodes=1,
        requests=REQUESTS,
        equal=equal,
        note=f"engines answered {' and '.join(f'{count:.0f}' for count in answered)}",
    )


def test_one_engine_dies(server: ServerProcess, row: Callable[..., None]) -> None:
    """It takes the other with it: vLLM serves with all engines or with none."""
    children = psutil.Process(server.pid).children(recursive=True)
    victim, _ = workers_of(server)
    told, ended = seconds_until_told_and_ended(server, victim.kill, LIMIT)
    _, alive = psutil.wait_procs(children, LIMIT)
    assert not alive
    row(executor="mp, data parallel", nodes=1, requests=4, told=told, ended=ended)
