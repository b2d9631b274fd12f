# SPDX-License-Identifier: Apache-2.0
"""`vllm serve --tensor-parallel-size 2` answers as one rank does."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from vllm_elastic.bench.server import ServerProcess

from .conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, Client, questions


@pytest.mark.timeout(900)  # on a busy machine two servers take minutes to start
def test_two_ranks_answer_as_one(client: Client, tmp_path: Path) -> None:
    options = ["--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--served-model-name", "tiny"]
    options += ["--elastic-config", json.dumps({"gamma": 0.8, "window": 12})]
    options += ["--tensor-parallel-size", "2"]
    cores = sorted(os.sched_getaffinity(0))
    env = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
    asked = questions(3)
    log = tmp_path / "server.log"
    with ServerProcess(MODEL, options, log=log, start_seconds=600, env=env) as server:
        two_ranks = [Client(server).chat(question, max_tokens=16) for question in asked]
    printed = log.read_text()
    assert "Worker_TP1" in printed and "on each of 2 ranks" in printed
    for question, (status, answer) in zip(asked, two_ranks, strict=True):
        assert status == 200, answer
        _, expected = client.chat(question, max_tokens=16)
        assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
        assert answer["usage"] == expected["usage"]
