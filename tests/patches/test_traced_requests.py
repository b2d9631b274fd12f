# SPDX-License-Identifier: Apache-2.0
"""Spans carry what the scheduler reports, outputs nothing of it: patches/traced_requests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.patches.front_end import REQUEST_ID, add_request
from vllm_elastic.engine.attachments import SPAN, attach

OURS = {"vllm.elastic.passes": 3, "vllm.elastic.policy": "elastic"}


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is handed to OpenTelemetry."""
    import vllm.tracing

    made: list[dict[str, Any]] = []
    backend = list(vllm.tracing._REGISTERED_TRACING_BACKENDS["otel"])
    backend[-1] = lambda name, start, end, attributes, context, kind: made.append(attributes)
    monkeypatch.setitem(vllm.tracing._REGISTERED_TRACING_BACKENDS, "otel", tuple(backend))
    return made


def finish(reports: list[dict[str, Any] | None]) -> Any:
    """A request's outputs, one token each, the last with its end; what a client gets."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats

    load_general_plugins()
    processor = OutputProcessor(tokenizer=None, log_stats=True, tracing_enabled=True)
    add_request(processor)
    seen = []
    for number, report in enumerate(reports):
        last = number == len(reports) - 1
        output = EngineCoreOutput(
            request_id=REQUEST_ID,
            new_token_ids=[5],
            finish_reason=FinishReason.LENGTH if last else None,
            kv_transfer_params=None if report is None else attach({"other": 1}, SPAN, report),
        )
        outputs = processor.process_outputs([output], 1.0, IterationStats())
        seen += outputs.request_outputs
    return seen


def test_the_newest_report_is_in_the_span(spans: list[dict[str, Any]]) -> None:
    seen = finish([{"vllm.elastic.passes": 1}, OURS])
    (span,) = spans
    assert span.items() >= OURS.items()
    assert span["gen_ai.usage.completion_tokens"] == 2
    assert [output.kv_transfer_params for output in seen] == [{"other": 1}, {"other": 1}]


def test_a_last_output_without_report(spans: list[dict[str, Any]]) -> None:
    finish([OURS, None])
    assert spans[0].items() >= OURS.items()


def test_other_spans_are_vllms_own(spans: list[dict[str, Any]]) -> None:
    finish([OURS])
    finish([None])
    assert not [name for name in spans[1] if name.startswith("vllm.elastic")]


def test_the_patch_is_needed(spans: list[dict[str, Any]]) -> None:
    """Stock vLLM's span has no place for a scheduler's own attributes."""
    from vllm.v1.engine import output_processor

    finish([None])
    stock = output_processor.OutputProcessor.do_tracing.__wrapped__
    names = stock.__code__.co_varnames[: stock.__code__.co_argcount]
    assert names == ("self", "engine_core_output", "req_state", "iteration_stats")
    assert all(name.startswith("gen_ai.") for name in spans[0]), (
        "patch traced_requests can go, or be simpler: see its record"
    )
