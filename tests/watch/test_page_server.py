# SPDX-License-Identifier: Apache-2.0
"""The page's own server against a stand-in for the one that is watched."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.documented_commands import arguments, documented
from vllm_elastic.bench.server import free_port
from vllm_elastic.presets import PRESETS
from vllm_elastic.watch.__main__ import make_parser
from vllm_elastic.watch.page_server import MOST_BYTES, PageServer, hosts_of

KEY = "secret"
SECONDS = 30
POLL = 0.02
"""Seconds until a server sees that it is to end."""


class Watched(ThreadingHTTPServer):
    """Answers with what it was asked; a stream waits for ``go_on`` before its second event."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.go_on = threading.Event()


class Handler(BaseHTTPRequestHandler):
    server: Watched

    def do_GET(self) -> None:
        self._reply(200, {"path": self.path, "key": self.headers["Authorization"]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "refuse" in body:
            self._reply(400, {"error": {"message": "no such knob"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())
        self.wfile.flush()
        assert self.server.go_on.wait(SECONDS)
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _reply(self, status: int, body: dict[str, Any]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture
def watched() -> Iterator[Watched]:
    with Watched() as server:
        threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


def serve(url: str, key: str | None = KEY) -> PageServer:
    server = PageServer(("127.0.0.1", 0), url, key)
    threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True).start()
    return server


@pytest.fixture
def page(watched: Watched) -> Iterator[PageServer]:
    server = serve(f"http://127.0.0.1:{watched.server_address[1]}/v1/")  # as clients name it
    yield server
    server.shutdown()
    server.server_close()


def ask(
    server: PageServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> http.client.HTTPResponse:
    """Headers as keywords: ``Content_Type``."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=SECONDS)
    sent = {"Content-Type": "application/json"} if body is not None else {}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, sent)
    return connection.getresponse()


def test_page_knows_presets_and_no_password(page: PageServer) -> None:
    answer = ask(page, "GET", "/")
    html = answer.read().decode()
    assert answer.status == 200 and all(f'"{name}":' in html for name in PRESETS)
    assert KEY not in html


def test_password_is_sent_on(page: PageServer) -> None:
    answer = ask(page, "GET", "/v1/models")
    assert json.loads(answer.read()) == {"path": "/v1/models", "key": f"Bearer {KEY}"}
    assert page.trouble() is None


def test_no_password_is_none(watched: Watched) -> None:
    server = serve(f"http://127.0.0.1:{watched.server_address[1]}", None)
    assert json.loads(ask(server, "GET", "/v1/models").read())["key"] is None
    server.shutdown()
    server.server_close()


def test_an_event_is_there_before_the_next(page: PageServer, watched: Watched) -> None:
    """A stream that is handed on when it has ended would show nothing appear."""
    answer = ask(page, "POST", "/v1/chat/completions", b'{"x": 1}')
    assert answer.getheader("Content-Type", "").startswith("text/event-stream")
    assert answer.readline() == b'data: {"x": 1}\n'
    watched.go_on.set()
    assert answer.read() == b"\ndata: [DONE]\n\n"


def test_a_refusal_is_handed_on(page: PageServer) -> None:
    answer = ask(page, "POST", "/v1/chat/completions", b'{"refuse": 1}')
    assert answer.status == 400 and b"no such knob" in answer.read()


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/metrics"), ("POST", "/v1/models"), ("GET", "/v1/chat/completions"), ("GET", "/x")],
)
def test_nothing_else_is_handed_on(method: str, path: str, page: PageServer) -> None:
    """Who reaches the page would reach all of the server, with its password."""
    assert ask(page, method, path, b"{}" if method == "POST" else None).status == 404


@pytest.mark.parametrize(
    ("length", "status"),
    [
        (str(MOST_BYTES + 1), 413),
        ("many", 400),
        ("", 400),
        ("-1", 400),
        ("1_0", 400),
        pytest.param("9" * 5000, 400, id="long"),
    ],
)
def test_a_question_has_a_limit(length: str, status: int, page: PageServer) -> None:
    """The connection is open still: a negative length was read until the asker went."""
    connection = http.client.HTTPConnection("127.0.0.1", page.server_address[1], timeout=SECONDS)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", length)
    connection.endheaders()
    assert connection.getresponse().status == status


REFUSED = b'{"refuse": 1}'
"""By the server that is watched, with a 400: it was handed on."""


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "origin",
    ["https://other.example", "http://localhost", "http://localhost:1", "http://[", "null", ""],
)
def test_a_page_of_another_site_may_not_ask(origin: str, path: str, page: PageServer) -> None:
    """It would ask with the password of whoever has it open."""
    body = REFUSED if path.endswith("completions") else None
    answer = ask(page, "POST" if body else "GET", path, body, Origin=origin)
    assert answer.status == 403


@pytest.mark.parametrize(
    "kind", ["text/plain", "text/plain; application/json", "multipart/form-data", ""]
)
def test_a_question_is_json(kind: str, page: PageServer) -> None:
    """Anything else a page of another site sends without asking first."""
    answer = ask(page, "POST", "/v1/chat/completions", REFUSED, Content_Type=kind)
    assert answer.status == 415


@pytest.mark.parametrize(
    "host", ["other.example:{port}", "127.0.0.1.other.example:{port}", "localhost", "localhost:1"]
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/chat/completions"])
def test_a_name_that_leads_here_is_not_ours(host: str, path: str, page: PageServer) -> None:
    """A site that gives its own name this machine's address could read the answers too."""
    host = host.format(port=page.server_address[1])
    body = REFUSED if path.endswith("completions") else None
    answer = ask(page, "POST" if body else "GET", path, body, Host=host, Origin=f"http://{host}")
    assert answer.status == 403
    assert page.url in json.loads(answer.read())["error"]["message"]


@pytest.mark.parametrize("name", ["localhost", "LocalHost", "127.0.0.1", "[::1]"])
def test_our_own_page_may_ask(name: str, page: PageServer) -> None:
    host = f"{name}:{page.server_address[1]}"
    own = {"Host": host, "Origin": f"http://{host.lower()}"}
    json_kind = "application/json; charset=utf-8"
    answer = ask(page, "POST", "/v1/chat/completions", REFUSED, Content_Type=json_kind, **own)
    assert answer.status == 400 and b"no such knob" in answer.read()
    assert ask(page, "GET", "/", Host=host).status == 200


def test_port_80_is_not_named() -> None:
    """Browsers leave it out."""
    assert {"localhost", "localhost:80"} <= (hosts_of("127.0.0.1", 80) or set())
    assert "127.0.0.2:8080" in (hosts_of("127.0.0.2", 8080) or ())


def test_others_reach_it_by_any_name(watched: Watched) -> None:
    """Where it listens for them; pages of other sites may not ask there either."""
    url = f"http://127.0.0.1:{watched.server_address[1]}"
    with PageServer(("0.0.0.0", 0), url, KEY) as server:
        threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True).start()
        for origin, status in {"http://gpu.example:8080": 200, "http://other.example": 403}.items():
            answer = ask(server, "GET", "/v1/models", Host="gpu.example:8080", Origin=origin)
            assert answer.status == status
        server.shutdown()


def test_says_that_no_server_is_there() -> None:
    server = serve(f"http://127.0.0.1:{free_port()}")
    answer = ask(server, "GET", "/v1/models")
    assert answer.status == 502
    assert server.watched in json.loads(answer.read())["error"]["message"]
    assert "refused" in (server.trouble() or "")
    server.shutdown()
    server.server_close()


COMMANDS = documented("python -m vllm_elastic.watch")


def test_command_is_documented() -> None:
    assert COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_understood(command: str) -> None:
    assert make_parser().parse_args(arguments(command)).server.startswith("http")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--server", "localhost:8000"], "--server: must begin with http:// or https://"),
        (["--port", "99999"], "--port: must be a number from 0 to 65535"),
    ],
)
def test_a_wrong_argument_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each was a traceback."""
    with pytest.raises(SystemExit):
        make_parser().parse_args(words)
    assert message in capsys.readouterr().err
