# SPDX-License-Identifier: Apache-2.0
"""Two ranks on two machines that share nothing but a cable, against the oracle."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tests.engine.test_oracle import CONFIGS
from tests.engine.test_tensor_parallel import MODELS
from vllm_elastic.bench.server import free_port

from .ray_node import Cluster, inherited
from .second_machine import SecondMachine

STOCK = "vllm.distributed.device_communicators.cpu_communicator.CpuCommunicator"
OURS = "vllm_elastic.patches.ray_on_cpu.communicator.NodeAwareCpuCommunicator"
ROOT = Path(__file__).parents[2]


def test_equals_oracle(cluster: Cluster, tmp_path: Path, row: Callable[..., None]) -> None:
    """Tokens, passes and start layers of every policy, mixed in one batch."""
    assert cluster.second is not None
    torch.manual_seed(0)
    model, result = tmp_path / "model", tmp_path / "found.json"
    MODELS["gqa-tied"]().save_pretrained(model)
    command = [sys.executable, "-m", "tests.cluster.over_two_nodes", str(model), str(result)]
    env = inherited() | cluster.env
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
    found = json.loads(result.read_text())
    first, second = sorted(found["ranks"], key=lambda rank: rank["rank"])
    assert [first["ip"], second["ip"]] == [cluster.head.ip, cluster.second.ip]
    for what in ("node", "network", "shared memory"):
        assert first[what] != second[what]
    # gloo, as on two machines: there is no shared memory to take.
    assert first["collectives"] == second["collectives"] == "torch.distributed"
    assert found["compared"] == found["requests"] == 2 * len(CONFIGS)
    row(
        executor="ray, gloo",
        nodes=2,
        policies=len(CONFIGS),
        requests=found["requests"],
        equal=found["equal"],
    )


def sums(
    communicator: str, machine: SecondMachine | None
) -> list[subprocess.CompletedProcess[str]]:
    """What two ranks print: one here and one on ``machine``, or both here."""
    ip = machine.outer_ip if machine else "127.0.0.1"
    devices = (machine.outer_device, machine.device) if machine else ("lo", "lo")
    place = [ip, str(free_port()), communicator]

    def rank(index: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.cluster.sum_of_ranks", str(index), *place]
        return subprocess.run(
            machine.command(command) if machine and index else command,
            cwd=ROOT,
            env=inherited() | {"GLOO_SOCKET_IFNAME": devices[index]},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, (0, 1)))


def assert_sums(printed: list[subprocess.CompletedProcess[str]], way: str) -> None:
    for done in printed:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.splitlines()[-1] == f"[3.0] [1.0, 2.0] {way}"


def test_ranks_that_share_no_memory_add_up(
    second_machine_permitted: None, row: Callable[..., None]
) -> None:
    with SecondMachine() as machine:
        assert_sums(sums(OURS, machine), "gloo")
    row(executor="gloo", nodes=2, note="patch ray_on_cpu: the communicator")


def test_ranks_on_one_machine_share_memory(row: Callable[..., None]) -> None:
    assert_sums(sums(OURS, None), "shared memory")
    row(executor="shared memory", nodes=1, note="patch ray_on_cpu: the communicator")


def test_patch_is_still_needed(second_machine_permitted: None, row: Callable[..., None]) -> None:
    with SecondMachine() as machine:
        _, second = sums(STOCK, machine)
    assert "open shm in SHMManager failed" in second.stderr, (
        "patch ray_on_cpu, part communicator, can go: vLLM's own one tells machines apart. Remove "
        "vllm_elastic/patches/ray_on_cpu/communicator.py, get_device_communicator_cls in "
        "vllm_elastic/patches/ray_on_cpu/platform.py, its part of the README and this test. "
        f"The second rank said:\n{second.stdout[-1000:]}{second.stderr[-3000:]}"
    )
    row(executor="gloo", nodes=2, note="stock vLLM's communicator still fails over two machines")
