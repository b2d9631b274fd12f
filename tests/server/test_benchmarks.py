# SPDX-License-Identifier: Apache-2.0
"""What `vllm bench serve` says of the server is what the requests' own records say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server_metrics import read_metrics

from .conftest import MODEL, Client, questions
from .metrics import is_idle, wait_for

COUNT = 6
CANVAS = 160  # enough for the model to end its answers
SET_LENGTH = 48
COUNTED = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:elastic_requests_total",
    "vllm:elastic_request_seconds_per_token_sum",
    "vllm:elastic_request_seconds_per_token_count",
    "vllm:e2e_request_latency_seconds_sum",
)


def text_of_questions(folder: Path) -> list[str]:
    """Questions that end where the model ends them, in the form that needs no further package."""
    turns = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": q}]}
        for q in questions(COUNT)
    ]
    (folder / "questions.json").write_text(json.dumps(turns))
    return [
        *["--backend", "openai-chat", "--endpoint", "/v1/chat/completions"],
        *["--dataset-name", "sharegpt", "--dataset-path", str(folder / "questions.json")],
        *["--sharegpt-output-len", str(CANVAS)],
    ]


def random_tokens(folder: Path) -> list[str]:
    """Prompts without sense and answers of a set length, as most figures are made."""
    return [
        *["--backend", "openai", "--dataset-name", "random", "--ignore-eos"],
        *["--random-input-len", "40", "--random-output-len", str(SET_LENGTH)],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "dataset", [pytest.param(text_of_questions, marks=pytest.mark.long), random_tokens]
)
def test_bench_serve_agrees_with_the_records(client: Client, tmp_path: Path, dataset: Any) -> None:
    """Tokens and requests are equal; seconds are never fewer than the server's own.

    How close the seconds come is in docs/serving.md: a busy machine decides no test.
    """
    wait_for(client.server, is_idle)
    before = read_metrics(client.server)
    result = bench_serve(client, tmp_path, dataset(tmp_path))
    wait_for(client.server, is_idle)
    after = read_metrics(client.server)
    said = {name: after[name] - before.get(name, 0.0) for name in COUNTED}

    assert result["completed"] == COUNT and result["failed"] == 0, result["errors"]
    assert said["vllm:elastic_requests_total"] == COUNT
    assert said["vllm:elastic_request_seconds_per_token_count"] == COUNT
    assert result["total_output_tokens"] == said["vllm:generation_tokens_total"]
    assert result["output_throughput"] == pytest.approx(
        said["vllm:generation_tokens_total"] / result["duration"]
    )
    if dataset is random_tokens:
        assert result["output_lens"] == [SET_LENGTH] * COUNT
        assert result["total_input_tokens"] == said["vllm:prompt_tokens_total"]
    else:
        assert 0 < min(result["output_lens"]) < CANVAS, "an answer that ends by itself"

    latencies, tokens = result["latencies"], result["output_lens"]
    assert sum(latencies) >= said["vllm:e2e_request_latency_seconds_sum"]
    seconds_per_token = sum(s / n for s, n in zip(latencies, tokens, strict=True))
    assert seconds_per_token >= said["vllm:elastic_request_seconds_per_token_sum"]


def bench_serve(client: Client, folder: Path, dataset: list[str]) -> dict[str, Any]:
    """Its detailed result."""
    command = [
        *[str(Path(sys.executable).with_name("vllm")), "bench", "serve"],
        *["--base-url", client.server.url, "--model", "tiny", "--tokenizer", str(MODEL)],
        *["--num-prompts", str(COUNT), "--max-concurrency", "2", "--disable-tqdm"],
        *["--save-result", "--save-detailed", "--result-filename", str(folder / "result.json")],
        *dataset,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result
