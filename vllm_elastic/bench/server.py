# SPDX-License-Identifier: Apache-2.0
"""A real ``vllm serve`` in a process of its own: start, wait until it answers, always end it."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

STOP_SECONDS = 20.0


class ServerProcess:
    """``vllm serve MODEL --plugin elastic`` on a free port of this machine; a context manager.

    Args:
        model: directory of a LLaDA.
        options: further command line options.
        log: file for everything that the server prints.
        start_seconds: time limit of the start.
        env: environment variables on top of this process's.
        command: the ``vllm`` to run; by default that of this Python's environment.
        directory: to run it in; by default this process's.

    Raises:
        RuntimeError: on entering, when the server ended or the time is up; with the log's tail.
    """

    def __init__(
        self,
        model: str | Path,
        options: Sequence[str] = (),
        *,
        log: Path,
        start_seconds: float = 300.0,
        env: Mapping[str, str] | None = None,
        command: Path | None = None,
        directory: Path | None = None,
    ) -> None:
        self.log = log
        self.start_seconds = start_seconds
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        arguments = ["serve", str(model), "--plugin", "elastic", *options]
        arguments += ["--host", "127.0.0.1", "--port", str(self.port)]
        self.command_line = shlex.join(["vllm", *arguments])
        self._command = [str(command or Path(sys.executable).with_name("vllm")), *arguments]
        self._directory = directory
        # In-process engines (tests, benchmarks) set this; a server has processes of its own.
        inherited = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        self._env = {**inherited, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._directory,
                start_new_session=True,  # its engine and workers share the group that we end
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self.port

    @property
    def pid(self) -> int:
        """Process id of the server; its engine and workers are in the same process group."""
        assert self._process is not None
        return self._process.pid

    def is_running(self) -> bool:
        """Whether the server's main process is alive."""
        return self._process is not None and self._process.poll() is None

    def wait(self, seconds: float) -> int:
        """The exit code of a server that ends by itself.

        Raises:
            TimeoutError: it is still running when the time is up; with the log's tail.
        """
        assert self._process is not None, "not started"
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            message = f"still running after {seconds:.0f} s. Its log:\n{self.log_tail()}"
            raise TimeoutError(message) from None

    def stop(self) -> None:
        """End the server and all that it started; harmless when it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whoever is left of its group
        self._process.wait()

    def log_tail(self, lines: int = 30) -> str:
        """The last lines that the server printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_healthy(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.start_seconds
        while not self._is_healthy():
            if not self.is_running():
                problem = f"ended with code {self._process.returncode}"
            elif time.monotonic() > deadline:
                problem = f"did not answer within {self.start_seconds:.0f} s"
            else:
                time.sleep(0.2)
                continue
            raise RuntimeError(f"`{self.command_line}` {problem}. Its log:\n{self.log_tail()}")

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
