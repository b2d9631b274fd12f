# SPDX-License-Identifier: Apache-2.0
"""For how many rows graphs are captured, and that the runner captures them when it is profiled."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.worker import gpu_worker

from tests.device import ON_CARD
from tests.live_bytes import LiveBytes
from tests.recorded_graphs import RecordedGraphs
from vllm_elastic.engine import optimisations
from vllm_elastic.engine.optimisations import graph_rows, whole_pass_rows
from vllm_elastic.models import ranks
from vllm_elastic.runner import cuda_graphs
from vllm_elastic.runner import runner as runner_module
from vllm_elastic.runner.executor import GraphExecutor, WholePassExecutor
from vllm_elastic.runner.options import RunnerOptions

from .conftest import Served, with_options
from .driver import Driver, prompt_of
from .plain_attention import plain_attention

pytestmark = pytest.mark.engine


def config_of(**options: Any) -> Any:
    """What vLLM's configuration has before it fills in what was left open."""
    given = dict(eager=False, mode=None, sizes=None, most=None, level=2, ranks=1, budget=8192)
    given["adapters"] = None
    assert options.keys() <= given.keys()
    given |= options
    return SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=given["eager"]),
        lora_config=given["adapters"],
        optimization_level=given["level"],
        parallel_config=SimpleNamespace(tensor_parallel_size=given["ranks"]),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=given["budget"]),
        compilation_config=SimpleNamespace(
            cudagraph_mode=given["mode"],
            cudagraph_capture_sizes=given["sizes"],
            max_cudagraph_capture_size=given["most"],
        ),
    )


@pytest.fixture
def _on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cuda=lambda: True)
    monkeypatch.setattr(optimisations, "current_platform", platform)


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    ("options", "first", "last", "count"),
    [
        ({}, 8, 512, 24),
        ({"mode": CUDAGraphMode.PIECEWISE, "level": 0}, 8, 512, 24),
        ({"mode": CUDAGraphMode.PIECEWISE, "ranks": 2}, 8, 512, 24),
        ({"most": 100}, 8, 112, 11),
        ({"most": 1024}, 8, 1024, 40),
        ({"budget": 60}, 8, 64, 8),
        ({"sizes": [1, 2, 4, 20, 129]}, 8, 160, 3),
        ({"sizes": [1, 2, 4, 20, 129], "most": 64}, 8, 24, 2),
    ],
)
def test_rows_that_flags_ask_for(
    options: dict[str, Any], first: int, last: int, count: int
) -> None:
    found = graph_rows(config_of(**options))
    assert (found[0], found[-1], len(found)) == (first, last, count)
    assert found == sorted(set(found))


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize(
    "options", [{"eager": True}, {"mode": CUDAGraphMode.NONE}, {"level": 0}, {"ranks": 2}]
)
def test_flags_that_switch_graphs_off(options: dict[str, Any]) -> None:
    assert graph_rows(config_of(**options)) == []


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (None, False),
        (CUDAGraphMode.NONE, False),
        (CUDAGraphMode.PIECEWISE, False),
        (CUDAGraphMode.FULL, True),
        (CUDAGraphMode.FULL_DECODE_ONLY, True),
        (CUDAGraphMode.FULL_AND_PIECEWISE, True),
    ],
)
def test_whole_passes_are_captured_where_they_are_asked_for(
    mode: CUDAGraphMode | None, wanted: bool
) -> None:
    found = whole_pass_rows(config_of(mode=mode), [8, 64, 256, 288, 512])
    assert found == ([8, 64, 256] if wanted else [])
    assert whole_pass_rows(config_of(mode=mode), []) == []


@pytest.mark.usefixtures("_on_a_gpu")
@pytest.mark.parametrize("options", [{"ranks": 2}, {"adapters": object()}])
def test_who_gets_none_is_told(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(optimisations.logger, "info", lambda line, *_: said.append(line))
    graph_rows(config_of())
    graph_rows(config_of(eager=True, **options))
    assert not said
    assert graph_rows(config_of(**options)) == []
    assert [line.split(":")[0] for line in said] == ["CUDA graphs are off"]


@pytest.mark.skipif(ON_CARD, reason="it captures")
def test_a_cpu_captures_nothing(serve: Callable[[str], Served]) -> None:
    assert graph_rows(config_of()) == []
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    assert RunnerOptions.of_engine(runner.vllm_config).graph_rows == []


def test_graphs_are_captured_in_the_profiling_run(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So vLLM measures what they take before it sizes the KV cache; and passes then use them."""
    served = serve("gqa-tied")
    runner: Any = served.engine.runner  # type: ignore[attr-defined]
    captured: list[RecordedGraphs] = []
    replays = [0]

    class Counting(RecordedGraphs):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            assert device == runner.device
            captured.append(self)

        def capture(self, work: Any) -> Any:
            assert not gc.isenabled(), "a collection inside a capture may end it"
            return super().capture(work)

        def take_memory(self, graph: Any) -> None:
            replays[0] += 1
            super().take_memory(graph)

    monkeypatch.setattr(runner_module, "CudaGraphs", Counting)
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda: 0)
    for name in ("_executor", "_graphs"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    with_options(monkeypatch, runner, graph_rows=[8, 24])
    runner.profile_run()
    assert isinstance(runner._executor, GraphExecutor) and len(captured) == 1
    assert gc.isenabled()
    at_start = replays[0]
    driver = Driver(served)
    driver.add(prompt_of(20, 1), 8, policy="elastic-block", window=4)
    driver.run()
    driver.take_records()
    assert replays[0] > at_start


@pytest.fixture
def graphed_runner(serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A runner that is to capture layers and whole passes, recorded for captured; of its state
    nothing stays."""
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    monkeypatch.setattr(runner_module, "CudaGraphs", RecordedGraphs)
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda: 0)
    monkeypatch.setattr(runner_module, "warm_up_passes", lambda *_: [])
    for name in ("_executor", "_graphs"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    with_options(monkeypatch, runner, graph_rows=[8, 24], whole_pass_rows=[8, 24])
    return runner


@pytest.mark.skipif(ON_CARD, reason="test_card_starts has a card's own")
def test_whole_passes_are_captured_once_the_cache_is_there(
    graphed_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, builder = graphed_runner, graphed_runner._attention_group.get_metadata_builder()
    runner.profile_run()
    layers, graphs = runner._executor, runner._graphs
    assert isinstance(layers, GraphExecutor)
    monkeypatch.setattr(type(builder), "_cudagraph_support", AttentionCGSupport.UNIFORM_BATCH)
    with plain_attention(runner):
        runner.warm_up()
    assert isinstance(runner._executor, WholePassExecutor)
    assert runner._executor.others is layers and runner._graphs is graphs
    assert sorted(runner._executor._passes._graphs) == [8, 24]


@pytest.mark.skipif(ON_CARD, reason="test_card_starts has a card's own")
def test_a_backend_that_takes_no_part_in_graphs(
    graphed_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of CPUs: all else runs as without the flag, and the log says so."""
    said: list[str] = []
    monkeypatch.setattr(runner_module.logger, "info", lambda line, *rest: said.append(line % rest))
    graphed_runner.profile_run()
    graphed_runner.warm_up()
    assert isinstance(graphed_runner._executor, GraphExecutor)
    assert "whole passes are not captured: CPU_ATTN takes no part in a graph" in said


@pytest.mark.parametrize("count", [1, 2])
def test_ranks_tell_each_other_once_all_is_captured(
    count: int, graphed_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's sums over ranks write to where the others' graphs read."""
    entered: list[str] = []

    @contextlib.contextmanager
    def graph_capture(device: torch.device) -> Iterator[None]:
        assert device == graphed_runner.device
        entered.append("in")
        yield
        entered.append("out")

    def capture(executor: GraphExecutor, *_: Any) -> None:
        entered.append("capture")

    class Launched(RecordedGraphs):
        def launch_new(self) -> None:
            entered.append("launch")

    monkeypatch.setattr(runner_module, "CudaGraphs", Launched)
    monkeypatch.setattr(ranks, "graph_capture", graph_capture)
    monkeypatch.setattr(ranks, "count", lambda: count)
    monkeypatch.setattr(GraphExecutor, "capture", capture)
    graphed_runner._capture_graphs([8])
    told = ["in", "capture", "out"] if count > 1 else ["capture"]
    assert entered == [*told, "launch"]


def test_a_device_that_refuses_is_told_with_the_remedy(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]

    class Refused(RecordedGraphs):
        def capture(self, work: Any) -> Any:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(runner_module, "CudaGraphs", Refused)
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda: 0)
    monkeypatch.setattr(runner, "_graphs", None)
    with_options(monkeypatch, runner, graph_rows=[8])
    with pytest.raises(RuntimeError, match="--enforce-eager"):
        runner.profile_run()


@pytest.mark.skipif(ON_CARD, reason="a card's own memory is measured there")
def test_vllm_sizes_the_cache_with_graphs_counted(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU worker's own code, on a device whose memory is what this process has alive."""
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    counts = [8, 24]

    @contextlib.contextmanager
    def memory_profiling(*_: Any, **__: Any) -> Iterator[Any]:
        found = SimpleNamespace(after_profile=SimpleNamespace(free_memory=0))
        with LiveBytes() as live:
            yield found
        found.total_consumed = sum(live.sizes.values())
        found.transient_peak_headroom = live.peak - found.total_consumed
        found.non_kv_cache_memory = live.peak

    monkeypatch.setattr(gpu_worker, "memory_profiling", memory_profiling)
    monkeypatch.setattr(runner_module, "CudaGraphs", RecordedGraphs)
    monkeypatch.setattr(cuda_graphs, "free_bytes", lambda: 0)
    monkeypatch.setattr(runner, "_executor", runner._executor)
    available = {}
    for rows in ([], counts):
        with_options(monkeypatch, runner, graph_rows=rows)
        worker: Any = MagicMock(spec=gpu_worker.Worker)
        worker.vllm_config, worker.model_runner = runner.vllm_config, runner
        worker.cache_config = SimpleNamespace(
            kv_cache_memory_bytes=None, gpu_memory_utilization=0.9
        )
        worker.model_config, worker.parallel_config = runner.model_config, SimpleNamespace()
        worker.init_snapshot = SimpleNamespace(free_memory=1 << 40, total_memory=1 << 40)
        worker.requested_memory, worker.randomize_dummy_inputs = 1 << 39, False
        runner.model_memory_usage = 0
        available[len(rows)] = gpu_worker.Worker.determine_available_memory(worker)
    static = runner._executor._static
    least = sum(rows.nbytes for rows in (static.x, static.positions, static.attended))
    assert available[0] - available[len(counts)] >= least > 0
