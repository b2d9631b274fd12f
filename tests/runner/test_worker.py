# SPDX-License-Identifier: Apache-2.0
"""vLLM's GPU worker around our runner, as far as that can be tried without a GPU."""

from __future__ import annotations

import gc
import inspect
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.worker import gpu_worker

from vllm_elastic.engine import worker as worker_module
from vllm_elastic.engine.worker import ElasticWorker, set_environment
from vllm_elastic.runner.options import RUNNER_OPTIONS, RunnerOptions
from vllm_elastic.runner.runner import ElasticRunner


@pytest.mark.parametrize("v2", [True, False])
def test_a_step_in_vllms_gpu_worker(v2: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton is, vLLM takes its second model runner for granted and asks what that has."""
    stage = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    monkeypatch.setattr(gpu_worker, "get_pp_group", lambda: stage)
    worker = SimpleNamespace(
        _pp_send_work=[],
        use_v2_model_runner=v2,
        model_runner=ElasticRunner.__new__(ElasticRunner),
        annotate_profile=lambda _: nullcontext(),
        vllm_config=SimpleNamespace(parallel_config=None, compilation_config=None),
    )
    execute: Any = inspect.unwrap(gpu_worker.Worker.execute_model)
    nothing = SimpleNamespace(total_num_scheduled_tokens=0, scheduled_new_reqs=[], elastic_plans=[])
    output = execute(worker, nothing)
    assert output is EMPTY_MODEL_RUNNER_OUTPUT


def test_a_pass_that_fails_is_not_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would take the earlier results for this step's, and never see the error."""
    runner = ElasticRunner.__new__(ElasticRunner)
    runner._overlaps, runner._queued = True, None
    step: Any = SimpleNamespace(scheduled_new_reqs=[], elastic_plans=["a plan"])
    monkeypatch.setattr(runner, "start", lambda plans: plans)
    assert runner.execute_model(step) is None
    monkeypatch.setattr(runner, "start", lambda plans: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.execute_model(step)
    assert runner.sample_tokens(None) is None


@pytest.mark.parametrize(
    ("device", "graphs", "asked", "done"),
    [
        ("cuda", [8, 16], "relax", ["products of 99 rows", "warmed up", "locked"]),
        ("cuda", [], "skip", ["warmed up"]),
        ("cpu", [], "relax", []),
    ],
)
def test_a_card_is_warmed_up(
    device: str, graphs: list[int], asked: str, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first request waits while attention, or products in 8 bits by blocks, are compiled,
    on cards where they are. Scratch that graphs point to must not be replaced afterwards."""
    seen: list[str] = []
    monkeypatch.setattr(worker_module, "lock_workspace", lambda: seen.append("locked"))
    monkeypatch.setattr(worker_module, "is_deep_gemm_supported", lambda: True)
    monkeypatch.setattr(worker_module, "envs", SimpleNamespace(VLLM_DEEP_GEMM_WARMUP=asked))
    monkeypatch.setattr(
        worker_module,
        "deep_gemm_warmup",
        lambda model, rows: seen.append(f"{model} of {rows} rows"),
    )
    runner = SimpleNamespace(
        model="products",
        warm_up=lambda: seen.append("warmed up"),
        compile_layers=lambda: 2.5,
    )
    options = RunnerOptions(graph_rows=graphs, whole_pass_rows=[], compiles=False)
    config = SimpleNamespace(
        additional_config={RUNNER_OPTIONS: options},
        scheduler_config=SimpleNamespace(max_num_batched_tokens=99),
    )
    worker: Any = SimpleNamespace(
        device=torch.device(device), model_runner=runner, vllm_config=config
    )
    try:
        times = ElasticWorker.compile_or_warm_up_model(worker)
    finally:
        gc.unfreeze()
    assert seen == done
    assert times.language_model == 2.5, "what vLLM says of the start"


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, "ieee"), (torch.bfloat16, None)])
def test_float32_is_multiplied_as_such(
    dtype: torch.dtype, wanted: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's attention would multiply in TF32, and no answer be the oracle's on a GPU."""
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    set_environment(dtype)
    assert os.environ.get("TRITON_F32_DEFAULT") == wanted
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7", "the operator's own"
    monkeypatch.setenv("TRITON_F32_DEFAULT", "tf32")
    set_environment(dtype)
    assert os.environ["TRITON_F32_DEFAULT"] == "tf32"
