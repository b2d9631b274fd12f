# SPDX-License-Identifier: Apache-2.0
"""End tokens stay out of answers, reports out of responses: patches/finished_answer."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_elastic.patches.finished_answer import KEY

END = 7
RECORD = {
    "model_name": "m",
    "engine": "0",
    "policy": "elastic",
    "denoising_steps": 3,
    "row_layers": 10,
    "full_row_layers": 40,
    "passes": {"first": 1, "window": 2},
}


def finish(tokens: list[list[int]], delta: bool = True, report: bool = True, **params: Any) -> Any:
    """Feed a request's tokens, the last batch with its end, and return what a client gets."""
    from vllm import SamplingParams
    from vllm.plugins import load_general_plugins
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    load_general_plugins()
    processor = OutputProcessor(tokenizer=None, log_stats=False)
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.CUMULATIVE
    request = EngineCoreRequest(
        request_id="0-1",
        external_req_id="0",
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(detokenize=False, output_kind=kind, **params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    processor.add_request(request, None)
    seen = []
    for index, new in enumerate(tokens):
        last = index == len(tokens) - 1
        output = EngineCoreOutput(
            request_id="0-1",
            new_token_ids=new,
            finish_reason=FinishReason.STOP if last else None,
            kv_transfer_params={"other": 1, KEY: {"end_token": True, "records": [RECORD]}}
            if last and report
            else None,
        )
        seen += processor.process_outputs([output]).request_outputs
    return seen


def test_end_token_is_left_out_of_deltas() -> None:
    outputs = finish([[3, 4], [5, END]])
    assert [list(o.outputs[0].token_ids) for o in outputs] == [[3, 4], [5]]
    assert outputs[-1].outputs[0].finish_reason == "stop"
    assert outputs[-1].kv_transfer_params == {"other": 1}


def test_end_token_is_left_out_of_the_whole() -> None:
    *_, last = finish([[3, 4], [END]], delta=False)
    assert list(last.outputs[0].token_ids) == [3, 4]


def test_empty_answer_keeps_its_end_token() -> None:
    """vLLM's server sends no last chunk, and no finish reason, for an answer without tokens."""
    (output,) = finish([[END]])
    assert list(output.outputs[0].token_ids) == [END]


def test_patch_is_still_needed() -> None:
    (output,) = finish([[3, END]], report=False)
    if list(output.outputs[0].token_ids) != [3, END]:
        pytest.fail("patch finished_answer: a part can go, stock vLLM leaves the end token out.")


def test_counters() -> None:
    from prometheus_client import REGISTRY

    from vllm_elastic.engine.metrics import count_finished

    labels = {"model_name": "m", "engine": "0", "policy": "elastic"}

    def value(name: str, **more: str) -> float:
        return REGISTRY.get_sample_value(f"vllm:elastic_{name}", labels | more) or 0.0

    names = ("denoising_steps_total", "row_layers_total", "full_row_layers_total")
    count_finished(RECORD)
    before = [value(name) for name in names]
    passes = value("passes_total", kind="window")
    count_finished(RECORD)
    assert [value(name) - b for name, b in zip(names, before, strict=True)] == [3, 10, 40]
    assert value("passes_total", kind="window") - passes == 2
