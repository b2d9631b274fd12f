# SPDX-License-Identifier: Apache-2.0
"""Serves the page, and hands what it asks on to the server that is watched.

So the page has one address to talk to, whatever that server allows to pages of other origins, and
its password stays here. A browser has pages of other sites open too: they may not ask.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vllm_elastic.page import self_contained
from vllm_elastic.presets import DEFAULT_PRESET, PRESETS

HANDED_ON = {"/v1/models": "GET", "/v1/chat/completions": "POST"}
MOST_BYTES = 1 << 20
"""The longest question that is handed on."""

READ_BYTES = 1 << 16

SECONDS_TO_ANSWER = 5
"""How long a server may take to list its models when the page starts."""


class PageServer(ThreadingHTTPServer):
    """One page at ``/``, and the paths of ``HANDED_ON``.

    Args:
        address: host and port to listen on; port 0 takes a free one.
        watched: address of a ``vllm serve``.
        api_key: its password, if it wants one.
        questions: to choose from on the page.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        watched: str,
        api_key: str | None = None,
        questions: Sequence[str] = (),
    ) -> None:
        super().__init__(address, _Handler)
        self.watched = watched.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.hosts = hosts_of(str(self.server_address[0]), self.server_address[1])
        self.page = self_contained(
            "watch",
            {
                "server": self.watched,
                "presets": {name: preset.meaning for name, preset in PRESETS.items()},
                "chosen": [DEFAULT_PRESET, "exact"],
                "questions": list(questions),
            },
        ).encode()

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def trouble(self) -> str | None:
        """Why the watched server cannot be asked now; None where it can."""
        request = urllib.request.Request(f"{self.watched}/v1/models", headers=self.headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS_TO_ANSWER):
                return None
        except (OSError, ValueError, http.client.HTTPException) as error:
            return str(error)


def hosts_of(address: str, port: int) -> frozenset[str] | None:
    """What a browser on this machine may call us; None: others reach us, by names of theirs.

    A site whose name leads to this machine for a while (DNS rebinding) has a name of its own.
    """
    if not ipaddress.ip_address(address).is_loopback:
        return None
    names = {"localhost", "127.0.0.1", "[::1]", address}
    return frozenset({f"{name}:{port}" for name in names} | (names if port == 80 else set()))


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        if self.path != "/":
            self._hand_on()
        elif self._is_ours():
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        self._hand_on()

    def log_message(self, format: str, *args: Any) -> None:
        """Nobody reads an access log of a page that runs beside a terminal."""

    def _is_ours(self) -> bool:
        """Whether our own page asks, or none; another site's is told so."""
        host = self.headers.get("Host", "").lower()
        origin = self.headers.get("Origin")
        if self.server.hosts is not None and host not in self.server.hosts:
            self._say(HTTPStatus.FORBIDDEN, f"not served as {host!r}: open {self.server.url}")
            return False
        if origin is not None and origin.lower() not in {f"http://{host}", f"https://{host}"}:
            self._say(HTTPStatus.FORBIDDEN, f"a page of {origin} may not ask")
            return False
        return True

    def _question(self) -> bytes | None:
        """The body of a question; None where that was refused.

        A page of another site sends JSON only after it has asked whether it may.
        """
        if self.headers.get_content_type() != "application/json":
            self._say(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Content-Type must be application/json")
            return None
        length = self.headers.get("Content-Length", "0").strip()
        if not re.fullmatch("[0-9]{1,18}", length):
            self._say(HTTPStatus.BAD_REQUEST, "Content-Length must be a number of bytes")
            return None
        if int(length) > MOST_BYTES:
            self._say(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MOST_BYTES} bytes")
            return None
        return self.rfile.read(int(length))

    def _hand_on(self) -> None:
        if not self._is_ours():
            return
        if HANDED_ON.get(self.path) != self.command:
            self._say(HTTPStatus.NOT_FOUND, f"no {self.command} {self.path} here")
            return
        body = None
        if self.command == "POST" and (body := self._question()) is None:
            return
        request = urllib.request.Request(
            self.server.watched + self.path,
            body,
            {"Content-Type": "application/json", **self.server.headers},
        )
        try:
            with urllib.request.urlopen(request) as answer:
                self._stream(answer)
        except urllib.error.HTTPError as error:
            kind = error.headers.get("Content-Type", "application/json")
            self._answer(error.code, kind, error.read())
        except (OSError, http.client.HTTPException) as error:
            if not isinstance(error, BrokenPipeError | ConnectionResetError):
                self._say(HTTPStatus.BAD_GATEWAY, f"{self.server.watched}: {error}")

    def _stream(self, answer: Any) -> None:
        """Everything as it arrives; the page has gone when writing fails, and then so do we."""
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Cache-Control", "no-store")
        self.end_headers()  # HTTP/1.0: the end of the connection is the end of the answer
        while chunk := answer.read1(READ_BYTES):
            self.wfile.write(chunk)
            self.wfile.flush()

    def _say(self, status: int, message: str) -> None:
        body = json.dumps({"error": {"message": message}}).encode()
        self._answer(status, "application/json", body)

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
