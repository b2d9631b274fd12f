# SPDX-License-Identifier: Apache-2.0
"""End tokens stay out of answers, reports out of responses and logs: patches/ended_requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.patches.front_end import REQUEST_ID, add_request
from vllm_elastic.engine.attachments import ENDED, EndedRequest, attach

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
END = 7
RECORD = EndedRequest(
    model_name="m",
    engine="0",
    policy="elastic",
    denoising_steps=3,
    row_layers=10,
    full_row_layers=40,
    passes={"first": 1, "window": 2},
    first_commit_seconds=0.25,
    seconds_per_token=None,
)


def finish(
    tokens: list[list[int]],
    delta: bool = True,
    report: bool = True,
    statistics: Any = None,
    tokenizer: Any = None,
    **params: Any,
) -> Any:
    """Feed a request's tokens, the last batch with its end, and return what a client gets.

    Args:
        report: the last token is an end token; without it and with a tokenizer nothing is the end.
    """
    from vllm.plugins import load_general_plugins
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.engine.output_processor import OutputProcessor

    load_general_plugins()
    processor = OutputProcessor(tokenizer=tokenizer, log_stats=statistics is not None)
    kind = RequestOutputKind.DELTA if delta else RequestOutputKind.CUMULATIVE
    add_request(processor, output_kind=kind, **params)
    seen = []
    for index, new in enumerate(tokens):
        last = index == len(tokens) - 1
        output = EngineCoreOutput(
            request_id=REQUEST_ID,
            new_token_ids=new,
            finish_reason=FinishReason.STOP if last and (report or tokenizer is None) else None,
            kv_transfer_params=attach({"other": 1}, ENDED, True) if last and report else None,
        )
        seen += processor.process_outputs([output], 1.0, iteration_stats=statistics).request_outputs
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


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([[3, 4], [5, END]], 3), ([[3, 4], [END]], 2), ([[3, END]], 1), ([[END]], 1)],
    ids=str,
)
def test_vllm_counts_what_the_api_says(tokens: list[list[int]], expected: int) -> None:
    """Its metrics and traces would have one more."""
    from vllm.v1.metrics.stats import IterationStats

    statistics = IterationStats()
    *_, last = finish(tokens, delta=False, statistics=statistics)
    assert len(last.outputs[0].token_ids) == expected
    assert statistics.num_generation_tokens == expected
    (ended,) = statistics.finished_requests
    assert ended.num_generation_tokens == expected


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from vllm.tokenizers import get_tokenizer

    return get_tokenizer(str(MODEL))


def finish_by_stop_string(tokenizer: Any, tokens: list[str], include: bool, statistics: Any) -> Any:
    *_, last = finish(
        [tokenizer.encode(text) for text in tokens],
        delta=False,
        report=tokens[-1].endswith("<|endoftext|>"),
        statistics=statistics,
        tokenizer=tokenizer,
        detokenize=True,
        stop=["91"],
        include_stop_str_in_output=include,
    )
    return last


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["fig 91 40 jet pin 7"], 2),  # one step's
        (["fig 91 40", "jet"], 2),
        (["fig 91 40 jet <|endoftext|>"], 2),
        (["fig", "91 <|endoftext|>"], 2),
        (["fig 91"], 2),
        (["91 <|endoftext|>"], 1),
    ],
    ids=str,
)
def test_vllm_counts_what_a_stop_string_leaves(
    tokenizer: Any, tokens: list[str], expected: int, include: bool
) -> None:
    """Its metrics and traces would have all that was shown at once."""
    from vllm.v1.metrics.stats import IterationStats

    statistics = IterationStats()
    last = finish_by_stop_string(tokenizer, tokens, include, statistics)
    (answer,) = last.outputs
    assert (answer.stop_reason, len(answer.token_ids)) == ("91", expected)
    assert answer.text.endswith("91") == include
    assert statistics.num_generation_tokens == expected
    (ended,) = statistics.finished_requests
    assert ended.num_generation_tokens == expected


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_an_end_that_is_asked_for_is_part_of_all(
    tokenizer: Any, include: bool, delta: bool
) -> None:
    """Of text, ids and counts, or of none of them."""
    from vllm.v1.metrics.stats import IterationStats

    statistics = IterationStats()
    answer = tokenizer.encode("fig 91 <|endoftext|>")
    (output,) = finish(
        [answer],
        delta=delta,
        statistics=statistics,
        tokenizer=tokenizer,
        detokenize=True,
        skip_special_tokens=False,
        include_stop_str_in_output=include,
    )
    kept = answer if include else answer[:-1]
    assert list(output.outputs[0].token_ids) == kept
    assert output.outputs[0].text.split() == tokenizer.decode(kept).split()
    assert statistics.num_generation_tokens == len(kept)
    (ended,) = statistics.finished_requests
    assert ended.num_generation_tokens == len(kept)


def test_patch_is_still_needed() -> None:
    (output,) = finish([[3, END]], report=False)
    if list(output.outputs[0].token_ids) != [3, END]:
        pytest.fail("patch ended_requests: a part can go, stock vLLM leaves the end token out.")


def test_stop_strings_are_still_counted(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import IterationStats

    load_general_plugins()
    name, statistics = "_update_stats_from_finished", IterationStats()
    monkeypatch.setattr(OutputProcessor, name, getattr(OutputProcessor, name).__wrapped__)
    finish_by_stop_string(tokenizer, ["fig 91 40 jet"], False, statistics)
    if statistics.num_generation_tokens != 4:
        pytest.fail(
            "patch ended_requests: a part can go, stock vLLM counts no token that a stop string "
            "cut off. Take count_answer out of vllm_elastic/patches/ended_requests.py."
        )


def counted(name: str, **labels: str) -> float:
    from prometheus_client import REGISTRY

    labels = {"model_name": "m", "engine": "0", "policy": "elastic", **labels}
    return REGISTRY.get_sample_value(f"vllm:elastic_{name}", labels) or 0.0


def test_counters() -> None:
    from vllm_elastic.engine.metrics import count_ended

    names = ("requests_total", "denoising_steps_total", "row_layers_total", "full_row_layers_total")
    names += ("request_first_commit_seconds_sum", "request_seconds_per_token_count")
    before = [counted(name) for name in names]
    passes = counted("passes_total", kind="window")
    count_ended(RECORD)
    count_ended(RECORD)
    after = [counted(name) for name in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [2, 6, 20, 80, 0.5, 0]
    assert counted("passes_total", kind="window") - passes == 4


def test_counters_outlive_an_engine() -> None:
    """vLLM unregisters all metrics of its own when an engine starts in this process."""
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    from vllm_elastic.engine.metrics import count_ended

    count_ended(RECORD)
    before = counted("requests_total")
    unregister_vllm_metrics()
    count_ended(RECORD)
    assert counted("requests_total") == before + 1


def test_report_is_taken_out_of_the_statistics() -> None:
    """vLLM's own loggers would take it for what a KV connector says, and fail."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.engine.output_processor import OutputProcessor
    from vllm.v1.metrics.stats import SchedulerStats

    load_general_plugins()
    before = counted("requests_total")
    processor = OutputProcessor(tokenizer=None, log_stats=True)
    for others in ({}, {"other": 1}):
        stats = SchedulerStats(kv_connector_stats=attach(others, ENDED, [RECORD, RECORD]))
        processor.update_scheduler_stats(stats)
        assert stats.kv_connector_stats == (others or None)
    assert counted("requests_total") == before + 4
