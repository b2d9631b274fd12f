# SPDX-License-Identifier: Apache-2.0
"""Ray nodes of a test's own: ``ray start --block``, each with its own folder, always ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from vllm_elastic.bench.server import free_port

from .second_machine import SecondMachine

START_SECONDS = 180.0
STOP_SECONDS = 10.0
OBJECT_STORE_BYTES = 80 << 20


class RayNode:
    """One node; a context manager that is entered when the node has started.

    Args:
        ip: the node's address.
        options: further options of ``ray start``.
        env: environment variables on top of this process's; Ray's workers inherit them.
        machine: where to start it; None: here.
    """

    def __init__(
        self,
        ip: str,
        options: list[str],
        env: Mapping[str, str],
        machine: SecondMachine | None = None,
    ) -> None:
        self.ip = ip
        # Short: Ray keeps sockets there, whose paths may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="ray"))
        self._log = self.folder / "start.log"
        command = [program("ray"), "start", *options, "--block", "--node-ip-address", ip]
        command += ["--temp-dir", str(self.folder), "--disable-usage-stats"]
        command += ["--object-store-memory", str(OBJECT_STORE_BYTES)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command if machine is None else machine.command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited(), **env},
                start_new_session=True,
            )

    def __enter__(self) -> RayNode:
        try:
            self._wait_until_started()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The node's processes that have ``title`` in their name, whatever group they are in."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in [*root.children(recursive=True), root]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    if title in process.name():
                        found.append(process)
        return found

    def kill(self) -> None:
        """All processes at once, without a goodbye."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End the node and all that it started, and remove its folder; harmless when it is gone."""
        started = self.processes()
        self._process.terminate()
        _, left = psutil.wait_procs(started, STOP_SECONDS)
        for process in {*left, *self.processes()}:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until_started(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (printed := self._log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"`ray start` on {self.ip} did not start:\n{printed}")
            time.sleep(0.1)


@dataclass
class Cluster:
    """A head on this machine, and a node on a second one unless there is none.

    ``env`` is what whoever joins from this machine needs.
    """

    head: RayNode
    env: dict[str, str]
    second: RayNode | None = None
    machine: SecondMachine | None = None


@contextlib.contextmanager
def one_node(cpus: int, **env: str) -> Iterator[Cluster]:
    """A Ray on this machine, for ``env`` and nothing else to find."""
    join = environment("127.0.0.1") | env
    with RayNode("127.0.0.1", head_options(join, "--num-cpus", str(cpus)), join) as head:
        yield Cluster(head, join)


@contextlib.contextmanager
def two_nodes(**env: str) -> Iterator[Cluster]:
    """A Ray over two machines with one logical GPU each, so that two ranks are on both."""
    with SecondMachine() as machine:
        join = environment(machine.outer_ip) | env
        # Which of a machine's addresses its ranks use among each other: docs/deploy.md.
        here = {"VLLM_HOST_IP": machine.outer_ip, "GLOO_SOCKET_IFNAME": machine.outer_device}
        there = {"VLLM_HOST_IP": machine.ip, "GLOO_SOCKET_IFNAME": machine.device}
        size = ["--num-cpus", "1", "--num-gpus", "1"]
        with (
            RayNode(machine.outer_ip, head_options(join, *size), join | here) as head,
            RayNode(
                machine.ip, ["--address", join["RAY_ADDRESS"], *size], join | there, machine
            ) as second,
        ):
            yield Cluster(head, join | here, second, machine)


def head_options(env: Mapping[str, str], *options: str) -> list[str]:
    port = env["RAY_ADDRESS"].rpartition(":")[2]
    return ["--head", "--port", port, "--include-dashboard", "false", *options]


def environment(ip: str) -> dict[str, str]:
    """Address and password of a cluster that is to be started at ``ip``."""
    return {
        "RAY_ADDRESS": f"{ip}:{free_port()}",
        # Whoever may connect to a Ray may run code in it.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def inherited() -> dict[str, str]:
    """This process's environment, less what is for engines inside it (tests/conftest.py)."""
    return {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}


def program(name: str) -> str:
    """A command of the environment that the tests run in."""
    return str(Path(sys.executable).with_name(name))
