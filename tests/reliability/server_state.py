# SPDX-License-Identifier: Apache-2.0
"""What a running server holds: memory and open files of its processes, requests, KV blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.server_metrics import (
    CACHE_CONFIG,
    CACHE_USAGE,
    RUNNING,
    WAITING,
    read_metrics,
)
from vllm_elastic.bench.server import ServerProcess

ROLES = ("API server", "engine core", "worker")

MIB = 1 << 20


@dataclass(frozen=True)
class ServerState:
    """A moment of a server.

    Attributes:
        memory: resident memory by process, in MiB.
        open_files: file descriptors by process.
        running: requests that hold KV blocks; waiting: requests that are queued for some.
        blocks_in_use, blocks: KV blocks, without vLLM's null block.
    """

    memory: dict[str, float]
    open_files: dict[str, int]
    running: int
    waiting: int
    blocks_in_use: int
    blocks: int

    @property
    def is_idle(self) -> bool:
        """Nothing running, waiting or held."""
        return not (self.running or self.waiting or self.blocks_in_use)


def read_state(server: ServerProcess) -> ServerState:
    """The server's state as its metrics and the kernel report it.

    Raises:
        OSError: the server does not answer.
        KeyError: it has no such metric.
    """
    metrics = read_metrics(server)
    blocks = int(metrics.label(CACHE_CONFIG, "num_gpu_blocks")) - 1
    processes = _processes(server.pid)
    return ServerState(
        memory={role: _resident_mib(pid) for role, pid in processes.items()},
        open_files={role: _open_files(pid) for role, pid in processes.items()},
        running=int(metrics[RUNNING]),
        waiting=int(metrics[WAITING]),
        blocks_in_use=round(metrics[CACHE_USAGE] * blocks),
        blocks=blocks,
    )


def _processes(leader: int) -> dict[str, int]:
    """Process ids of the server's process group by role."""
    found = {"API server": leader}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name in brackets: state, parent, process group.
            group = int((entry / "stat").read_text().rpartition(")")[2].split()[2])
            title = (entry / "cmdline").read_text()
        except OSError:
            continue  # it ended meanwhile
        if group == leader and title.startswith("VLLM::"):
            found["engine core" if "EngineCore" in title else "worker"] = int(entry.name)
    return {role: found[role] for role in ROLES if role in found}


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) * 1024 / MIB if found else 0.0


def _open_files(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
