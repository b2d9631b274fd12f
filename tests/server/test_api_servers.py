# SPDX-License-Identifier: Apache-2.0
"""Several API servers before one engine, which vLLM starts for data parallelism by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_elastic.bench.server import ServerProcess

from .conftest import KV_CACHE_BYTES, MODEL, MODEL_LENGTH, Client

pytestmark = pytest.mark.long


def test_each_knows_the_engines_knobs(tmp_path: Path) -> None:
    """Else what they let through ends the engine, and their default is another canvas."""
    options = ["--api-server-count", "2", "--max-model-len", str(MODEL_LENGTH)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    options += ["--elastic-config", '{"default_max_tokens": 48, "max_window": 64}']
    with ServerProcess(MODEL, options, log=tmp_path / "server.log") as server:
        client = Client(server)
        for _ in range(8):  # to either
            status, answer = client.chat("Reverse : a b", ignore_eos=True)
            assert (status, answer["usage"]["completion_tokens"]) == (200, 48)
            status, answer = client.chat("2", max_tokens=99, vllm_xargs={"elastic_window": 128})
            assert status == 400 and "max_window" in answer["error"]["message"]
