# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --tensor-parallel-size 2` answers as the oracle does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.reference import ElasticOptions, LLaDA, elastic_cache

from .conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, Client, questions, user

CANVAS = 24
OPTIONS = {"gamma": 0.8, "window": 12, "commit": "threshold"}


@pytest.mark.long  # the ranks' numbers are tests/engine's
@pytest.mark.timeout(900)  # a server with two ranks takes minutes to start on a busy machine
def test_two_ranks_answer_as_the_oracle(tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--served-model-name", "tiny"]
    options += ["--elastic-config", json.dumps({"policy": "elastic", **OPTIONS})]
    options += ["--tensor-parallel-size", "2"]
    cores = sorted(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    log = tmp_path / "server.log"
    with ServerProcess(MODEL, options, log=log, start_seconds=600, env=env) as server:
        client = Client(server)
        answers = [
            client.post(
                "chat/completions", messages=user(q), max_tokens=CANVAS, return_token_ids=True
            )
            for q in questions(3)
        ]
    printed = log.read_text()
    assert "Worker_TP1" in printed and "on each of 2 ranks" in printed
    oracle = LLaDA.from_pretrained(MODEL)
    for status, answer in answers:
        assert status == 200, answer
        (choice,) = answer["choices"]
        expected = elastic_cache(
            oracle, answer["prompt_token_ids"], CANVAS, ElasticOptions(**OPTIONS)
        )
        assert choice["token_ids"] == expected.token_ids
        assert len(expected.token_ids) > 1, "an answer that could tell a difference"
