# SPDX-License-Identifier: Apache-2.0
"""A second machine made of Linux namespaces, joined to this one by a virtual cable.

It has its own name, network, shared memory, IPC objects and processes: what runs in it meets what
runs outside over TCP only, as on another machine. Files and cores are this machine's.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import signal
import subprocess

# Of 198.18.0.0/15, which is reserved for tests of networks and routed nowhere.
ADDRESSES = "198.18"

# Its own shared memory, loopback and name, and then the command.
ENTER = """
mount -t tmpfs tmpfs /dev/shm && ip link set lo up && echo second > /proc/sys/kernel/hostname &&
exec "$@"
"""
UNSHARE = ["unshare", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child"]
UNSHARE += ["--mount-proc"]

_count = itertools.count()


class SecondMachine:
    """A context manager; everything is removed at its end, and what still runs there is ended.

    Raises:
        OSError: on entering, when this machine does not permit it; with what it said.
    """

    def __init__(self) -> None:
        tag = f"{os.getpid()}n{next(_count)}"
        self.name = f"elastic-{tag}"
        self.device = "eth0"
        self.outer_device = f"el{tag}"[:15]
        network = (os.getpid() * 31 + next(_count)) % (1 << 14) * 4  # a /30 of two addresses
        self.outer_ip = f"{ADDRESSES}.{network // 256}.{network % 256 + 1}"
        self.ip = f"{ADDRESSES}.{network // 256}.{network % 256 + 2}"

    def __enter__(self) -> SecondMachine:
        try:
            run("ip", "netns", "add", self.name)
            ends = ["dev", self.outer_device], ["dev", self.device]
            peer = ["peer", "name", self.device, "netns", self.name]
            run("ip", "link", "add", self.outer_device, "type", "veth", *peer)
            for ip, prefix, device in (
                (self.outer_ip, ["ip"], ends[0]),
                (self.ip, ["ip", "-n", self.name], ends[1]),
            ):
                run(*prefix, "addr", "add", f"{ip}/30", *device)
                run(*prefix, "link", "set", *device, "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def command(self, command: list[str]) -> list[str]:
        """What runs ``command`` on it. Killing that ends all that the command started."""
        return ["ip", "netns", "exec", self.name, *UNSHARE, "sh", "-c", ENTER, "sh", *command]

    def pull_cable(self) -> None:
        """From now on nothing arrives, in either direction, and nobody is told."""
        run("ip", "link", "set", "dev", self.outer_device, "down")

    def close(self) -> None:
        """Remove it; harmless when it is gone."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # The cable by name: a namespace, and with it its end, lives on for as long as a process.
        for command in (["link", "delete", self.outer_device], ["netns", "delete", self.name]):
            subprocess.run(["ip", *command], capture_output=True)


@functools.cache
def why_not() -> str | None:
    """Why there can be no second machine here; None if there can."""
    for tool in ("ip", "unshare"):
        if shutil.which(tool) is None:
            return f"no second machine: no `{tool}` here (Debian: iproute2, util-linux)"
    try:
        with SecondMachine() as machine:
            run(*machine.command(["true"]))
    except OSError as error:
        return f"no second machine, namespaces are not permitted here: {error}"
    return None


def run(*command: str) -> None:
    """Run it; an OSError with what it printed if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"`{' '.join(command)}`: {done.stderr.strip()}")
