# SPDX-License-Identifier: Apache-2.0
"""On a card: what flags make of the start, from the GPU worker to the graphs that passes replay."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.device import ON_CARD
from tests.engines_kept import let_go
from vllm_elastic.runner import cuda_graphs, runner
from vllm_elastic.runner.executor import EagerExecutor, GraphExecutor, WholePassExecutor
from vllm_elastic.runner.graphed_pass import bytes_of_passes

from .conftest import Served, make_engine
from .test_oracle import CONFIGS, compare, request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ON_CARD, reason="a CPU has another worker, and no graphs"),
]

WHOLE: dict[str, Any] = {"cudagraph_mode": "FULL_AND_PIECEWISE"}
CHUNKS = 8 << 20
"""Bytes: CUDA takes memory by 2 MiB, so its count of what it keeps may be off by some of them."""
SMALL: dict[str, Any] = {"row_budget": 256, "max_cudagraph_capture_size": 64}
"""A start takes seconds instead of a minute."""

SAME_PRODUCTS: tuple[type, ...] = (EagerExecutor, GraphExecutor)
"""Row for row; a whole pass has another number of rows in its last layer."""

STARTS: list[tuple[dict[str, Any], type]] = [
    ({"enforce_eager": True}, EagerExecutor),
    ({}, GraphExecutor),
    ({"kv_cache_memory_bytes": None}, GraphExecutor),  # vLLM measures what is left for it
    ({"async_scheduling": True}, GraphExecutor),
    ({"compilation_config": WHOLE, "kv_cache_memory_bytes": None}, WholePassExecutor),
]


@pytest.mark.parametrize(("flags", "executor"), STARTS)
@pytest.mark.parametrize(
    ("dtype", "backend"), [("float32", "TRITON_ATTN"), ("bfloat16", "FLASH_ATTN")]
)
def test_a_start(
    flags: dict[str, Any],
    executor: type,
    dtype: str,
    backend: str,
    serve: Callable[[str], Served],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replays: Counter[int] = Counter()

    def replay(graph: Any) -> None:
        replays[id(graph)] += 1
        graph._graph.replay()

    monkeypatch.setattr(cuda_graphs.CudaGraph, "replay", replay)
    served = serve("gqa-tied")
    torch.cuda.reset_peak_memory_stats()
    before = cuda_graphs.free_bytes()
    kept, room = _kept_of_graphs(monkeypatch)
    options = {"enforce_eager": False} | SMALL | flags
    engine = make_engine(served.directory, dtype=dtype, **options)
    replays.clear()  # each was launched at start
    assert type(engine.runner._executor) is executor
    assert engine.runner._attention_group.backend.get_name() == backend
    cases = [(index, name) for index in (0, 6) for name in CONFIGS]
    results = engine.run([request(*case) for case in cases])
    assert bool(replays) == (executor is not EagerExecutor)
    if dtype == "float32":
        compare(served, cases, results)
    elif executor in SAME_PRODUCTS and "async_scheduling" not in flags:
        answers = [result["token_ids"] for result in results]
        assert _answers.setdefault(dtype, answers) == answers
    if "kv_cache_memory_bytes" in flags:
        share = engine.llm.llm_engine.vllm_config.cache_config.gpu_memory_utilization
        transient = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        taken = before - cuda_graphs.free_bytes() + transient
        most = share * torch.cuda.mem_get_info()[1]
        assert most / 2 < taken <= most
    if executor is WholePassExecutor:
        of_layers, of_passes = (each.by_cuda for each in kept)
        # CUDA counts in chunks, and this model's graphs are small.
        assert of_layers >= 0 and of_passes <= room[0] + CHUNKS
    let_go(engine)


_answers: dict[str, Any] = {}


def _kept_of_graphs(patch: pytest.MonkeyPatch) -> tuple[list[cuda_graphs.Taken], list[int]]:
    """What CUDA keeps, by what is captured, and how much room the profiling run left for whole
    passes'."""
    kept: list[cuda_graphs.Taken] = []
    room: list[int] = []

    @contextlib.contextmanager
    def noted(*args: Any) -> Iterator[cuda_graphs.Taken]:
        with cuda_graphs.capturing(*args) as taken:
            yield taken
        kept.append(taken)

    def noted_room(*args: int) -> int:
        room.append(bytes_of_passes(*args))
        return room[-1]

    patch.setattr(runner, "capturing", noted)
    patch.setattr(runner, "bytes_of_passes", noted_room)
    return kept, room
