# SPDX-License-Identifier: Apache-2.0
"""An OpenTelemetry collector that keeps what it is sent: OTLP over HTTP, in this process."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

SECONDS = 60.0
EXPORTS = {
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    "OTEL_BSP_SCHEDULE_DELAY": "200",  # milliseconds
}
"""Environment of a server whose spans are to arrive here, and soon."""


class TraceReceiver(ThreadingHTTPServer):
    """A context manager; listens on a free port.

    Attributes:
        spans: in the order in which they came.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: list[Span] = []

    @property
    def url(self) -> str:
        """For ``--otlp-traces-endpoint``."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def __enter__(self) -> TraceReceiver:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()

    def of(self, answer_id: str, count: int = 1) -> list[Span]:
        """The ``count`` spans of an answer, one for each of its choices, as they came.

        By the answer's id: spans are sent behind the answers, those of other requests too.

        Raises:
            TimeoutError: there are fewer.
        """
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            found = [span for span in self.spans if answer_id in _request_id(span)]
            if len(found) >= count:
                return found
            time.sleep(0.05)
        raise TimeoutError(f"spans: {[(span.name, _request_id(span)) for span in self.spans]}")


def attributes(span: Span) -> dict[str, Any]:
    """By name, as Python's values."""
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


def _request_id(span: Span) -> str:
    return str(attributes(span).get("gen_ai.request.id", ""))


class _Handler(BaseHTTPRequestHandler):
    server: TraceReceiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans.extend(scope.spans)
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass
