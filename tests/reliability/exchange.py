# SPDX-License-Identifier: Apache-2.0
"""One request to a server and what came back, whole or streamed, to the end or cut off.

Plain sockets: a client library would hide what the server really answers.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class Ask:
    """An HTTP request.

    Attributes:
        path: with its leading slash.
        body: a JSON object, or bytes that are sent as they are; None: a GET without a body.
        content_type: None sends no such header.
        leave_after: hang up after this many streamed events; None: stay.
    """

    path: str
    body: Any = None
    content_type: str | None = "application/json"
    leave_after: int | None = None

    def streamed(self, leave_after: int | None = None) -> Ask:
        """The same request, answered as a stream."""
        return Ask(self.path, {**self.body, "stream": True}, self.content_type, leave_after)

    def payload(self) -> bytes | None:
        """What is sent as the body."""
        if self.body is None or isinstance(self.body, bytes):
            return self.body
        return json.dumps(self.body).encode()


@dataclass
class Choice:
    """One answer to a request; of a stream that was left, its beginning."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass
class Answer:
    """What a server said.

    Attributes:
        status: HTTP status; of an error inside a stream its code; 0: no answer at all.
        choices: by index; empty for anything but a completion.
        error: the server's message, or the client's trouble; "" without either.
        left: this client hung up before the end.
    """

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""
    left: bool = False

    def add(self, data: Mapping[str, Any]) -> None:
        """Take in an answer's JSON object or an event of a stream."""
        for part in data.get("choices") or ():
            if not isinstance(part, dict):
                continue
            choice = self.choices.setdefault(part.get("index", 0), Choice())
            message = part.get("delta") or part.get("message") or {}
            choice.text += part.get("text") or message.get("content") or ""
            choice.token_ids += part.get("token_ids") or []
            choice.finish_reason = part.get("finish_reason") or choice.finish_reason
        error = data.get("error")
        if error:
            self.error = json.dumps(error)[:2000]
            code = error.get("code") if isinstance(error, dict) else None
            if self.status < 400:  # a stream has begun with 200
                self.status = code if isinstance(code, int) else 500


def exchange(address: tuple[str, int], ask: Ask, timeout: float = TIMEOUT_SECONDS) -> Answer:
    """Send a request and read the answer; no trouble of the connection raises.

    Args:
        address: host and port.
        timeout: of each read, in seconds.
    """
    connection = http.client.HTTPConnection(*address, timeout=timeout)
    answer = Answer(0)
    try:
        payload = ask.payload()
        headers = {} if ask.content_type is None else {"Content-Type": ask.content_type}
        connection.request("GET" if payload is None else "POST", ask.path, payload, headers)
        with connection.getresponse() as response:  # it holds the socket too
            answer.status = response.status
            if "event-stream" in (response.getheader("Content-Type") or ""):
                _read_stream(response, ask.leave_after, answer)
            else:
                _read_whole(response, answer)
    except (OSError, http.client.HTTPException) as error:
        what = "no answer in time" if isinstance(error, socket.timeout) else repr(error)
        answer.status, answer.error = 0, what
    finally:
        connection.close()
    return answer


def _read_whole(response: http.client.HTTPResponse, answer: Answer) -> None:
    text = response.read().decode(errors="replace")
    try:
        data = json.loads(text)
    except ValueError:
        data = None
    if isinstance(data, dict):
        answer.add(data)
    if answer.status >= 400 and not answer.error:
        answer.error = text[:2000]


def _read_stream(
    response: http.client.HTTPResponse, leave_after: int | None, answer: Answer
) -> None:
    for count, event in enumerate(_events(response), start=1):
        answer.add(event)
        if count == leave_after:
            answer.left = True
            return


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        if line.startswith(b"data: {"):
            yield json.loads(line[len(b"data: ") :])
