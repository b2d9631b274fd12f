# SPDX-License-Identifier: Apache-2.0
"""A rank, a node or the network dies under load: clients are told, and the server ends.

vLLM restarts no engine. Bounds are wide, how long it took is in the closing table.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from .ray_node import Cluster, RayNode
from .serving import LIMIT, a_core_each, answers_equal_oracle, seconds_until_told_and_ended, serve

TWO_RANKS = ["--tensor-parallel-size", "2"]
OVER_RAY = [*TWO_RANKS, "--distributed-executor-backend", "ray"]
RANK = "RayWorkerProc"


def test_a_rank_of_mp_dies(tmp_path: Path, row: Callable[..., None]) -> None:
    env = {"VLLM_CPU_OMP_THREADS_BIND": a_core_each()}
    with serve(tmp_path / "server.log", TWO_RANKS, env) as server:
        equal = answers_equal_oracle(server, 3)
        children = psutil.Process(server.pid).children(recursive=True)
        (victim,) = [child for child in children if child.name() == "VLLM::Worker_TP1"]
        told, ended = seconds_until_told_and_ended(server, victim.kill, LIMIT)
        _, alive = psutil.wait_procs(children, LIMIT)
        assert not alive
    row(executor="mp", nodes=1, requests=3, equal=equal, told=told, ended=ended)


def rank_on(node: RayNode) -> psutil.Process:
    (rank,) = node.processes(RANK)
    return rank


def kill_the_first_rank(cluster: Cluster) -> None:
    rank_on(cluster.head).kill()


def kill_the_second_rank(cluster: Cluster) -> None:
    assert cluster.second is not None
    rank_on(cluster.second).kill()


def kill_the_second_raylet(cluster: Cluster) -> None:
    assert cluster.second is not None
    (raylet,) = cluster.second.processes("raylet")
    raylet.kill()


def kill_the_second_machine(cluster: Cluster) -> None:
    assert cluster.second is not None
    cluster.second.kill()


def pull_the_cable(cluster: Cluster) -> None:
    assert cluster.machine is not None
    cluster.machine.pull_cable()


@pytest.mark.parametrize(
    "break_it",
    [
        kill_the_first_rank,
        kill_the_second_rank,
        kill_the_second_raylet,
        kill_the_second_machine,
        pull_the_cable,
    ],
    ids=lambda function: function.__name__,
)
def test_two_nodes(
    break_it: Callable[[Cluster], None],
    cluster: Cluster,
    tmp_path: Path,
    row: Callable[..., None],
) -> None:
    with serve(tmp_path / "server.log", OVER_RAY, cluster.env) as server:
        equal = answers_equal_oracle(server, 3)
        ranks = [rank_on(cluster.head)]
        told, ended = seconds_until_told_and_ended(server, lambda: break_it(cluster), LIMIT)
        # The rank that was left has ended too: its device is free for the next server.
        _, alive = psutil.wait_procs(ranks, LIMIT)
        assert not alive
    row(executor="ray, gloo", nodes=2, requests=3, equal=equal, told=told, ended=ended)
