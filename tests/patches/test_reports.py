# SPDX-License-Identifier: Apache-2.0
"""Every report reaches its reader, and vLLM's outputs are its own again: patches/reports."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.patches.front_end import add_request
from vllm_elastic.engine.attachments import ENDED, PASSES, SPAN, attach

KEYS = (ENDED, PASSES, SPAN)


def processor_of(*request_ids: str) -> Any:
    from vllm.plugins import load_general_plugins
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.output_processor import OutputProcessor

    load_general_plugins()
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    for request_id in request_ids:
        add_request(processor, request_id, output_kind=RequestOutputKind.DELTA)
    return processor


def output(request_id: str, tokens: list[int], *keys: str, finish: Any = None) -> Any:
    """An output with what a connector says, and with these reports."""
    from vllm.v1.engine import EngineCoreOutput

    params: dict[str, Any] = {"other": 1}
    for key in keys:
        params = attach(params, key, [])
    return EngineCoreOutput(
        request_id=f"{request_id}-1",
        new_token_ids=tokens,
        kv_transfer_params=params,
        finish_reason=finish,
    )


def shown(outputs: Any) -> list[tuple[str, list[int], Any]]:
    return [
        (seen.request_id, list(seen.outputs[0].token_ids), seen.kv_transfer_params)
        for seen in outputs.request_outputs
    ]


@pytest.mark.parametrize("key", KEYS)
def test_an_output_for_a_report_alone_goes_no_further(key: str) -> None:
    """vLLM would stream it, and time the request's first token by it."""
    processor = processor_of("a", "b")
    batch = [output("a", [], key), output("b", [5], key), output("a", [6])]
    left = {"other": 1}
    assert shown(processor.process_outputs(batch, 1.0)) == [("b", [5], left), ("a", [6], left)]


def test_one_output_carries_all_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.engine import FinishReason

    from vllm_elastic.patches import reports

    processor, seen = processor_of("a"), []

    def note(key: str, state: Any, *_: Any) -> None:
        seen.append((state.external_req_id, key))

    readers = {key: functools.partial(note, key) for key in KEYS}
    monkeypatch.setattr(reports, "_READERS", readers)
    last = output("a", [5], *KEYS, finish=FinishReason.STOP)
    assert shown(processor.process_outputs([last], 1.0)) == [("a", [5], {"other": 1})]
    assert sorted(seen) == [("a", key) for key in sorted(KEYS)]


@pytest.mark.parametrize("key", KEYS)
def test_a_report_of_a_request_that_has_left(key: str) -> None:
    """Its client is gone; the engine does not know yet."""
    assert shown(processor_of().process_outputs([output("a", [5], key)], 1.0)) == []


def test_vllm_without_connectors_and_reports_is_untouched() -> None:
    """An output of another model that has no tokens is vLLM's to judge."""
    from vllm.v1.engine import EngineCoreOutput

    empty = EngineCoreOutput(request_id="a-1", new_token_ids=[])
    assert shown(processor_of("a").process_outputs([empty], 1.0)) == [("a", [], None)]


def test_the_patch_is_needed() -> None:
    """Stock vLLM hands to the client whatever the one free-form field has."""
    from vllm.v1.engine.output_processor import OutputProcessor

    stock = OutputProcessor.process_outputs.__wrapped__
    ((_, _, params),) = shown(stock(processor_of("a"), [output("a", [5], SPAN)], 1.0))
    assert params == {"other": 1, SPAN: []}, "patch reports can go, or be simpler: see its record"
