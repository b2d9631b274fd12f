# SPDX-License-Identifier: Apache-2.0
"""What is refused, switched off and left alone when an engine starts."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from tests.device import ON_CARD
from tests.pretended_card import pretended_card
from vllm_elastic.engine import engine_config
from vllm_elastic.runner.options import RunnerOptions

from .conftest import MASK, ORACLES_DEFAULTS, Served, make_engine, poison
from .test_oracle import ask_oracle

pytestmark = pytest.mark.engine

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"


def make_config(**options: Any) -> Any:
    """vLLM's configuration of the tiny model: all that happens before an engine is built."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(MODEL), dtype="float32", **options).create_engine_config()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What is logged at start; vLLM's loggers do not propagate to pytest's."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [
        logging.getLogger(f"vllm.vllm_elastic.engine.{name}")
        for name in ("engine_config", "request_defaults")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("flag", "options"),
    [
        ("--pipeline-parallel-size", {"pipeline_parallel_size": 2}),
        ("--tensor-parallel-size: 3 ranks .* an MLP of width 512", {"tensor_parallel_size": 3}),
        (
            "--tensor-parallel-size: 3 ranks cannot share 2 KV heads evenly",
            {
                "tensor_parallel_size": 3,
                "hf_overrides": {"n_kv_heads": 2, "mlp_hidden_size": 510},
            },
        ),
        (
            "--decode-context-parallel-size",
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
        ),
        (
            "--speculative-config",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        ),
        (
            "--max-num-scheduled-tokens: 512 is more than --max-num-batched-tokens 256",
            {"max_num_scheduled_tokens": 512, "max_num_batched_tokens": 256},
        ),
        ("--fully-sharded-loras", {"enable_lora": True, "fully_sharded_loras": True}),
        ("--kv-cache-dtype", {"kv_cache_dtype": "fp8"}),
        ("--kv-cache-dtype: .* the model's .float32.", {"kv_cache_dtype": "bfloat16"}),
        (
            "--kv-transfer-config",
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        ),
    ],
)
def test_refused_at_start(flag: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{flag}.*vllm_elastic"):
        make_config(**options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gama": 0.9}, "unknown parameter 'gama'. Did you mean 'gamma'"),
        ({"hidden_stride": 8}, "--elastic-config: hidden_stride 8 .* at most 7"),
        ({"default_max_tokens": 5000}, "default_max_tokens 5000 leaves no room .* 2048"),
        ({"grow_by": 24, "policy": "dual-cache"}, "--elastic-config: 'elastic_grow_by' 24 must be"),
        ({"steps": 7}, "with default_max_tokens 256, .*'elastic_steps' 7 must be a multiple"),
        ({"alg": "entropy", "steps": 257}, "default_max_tokens 256, .*'elastic_steps' 257 is more"),
        ({"gamma": 7}, "'gamma' must be a number from 0 to 2, got 7"),
        ({"window": 2000}, "'window' is 2000, .*'max_window' 1024 .* raise max_window"),
        ({"max_window": 12}, "'window' is 16, .*'max_window' 12"),
        ([], "elastic config must be a JSON object"),
    ],
)
def test_bad_elastic_config(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(additional_config={"elastic": values})


@pytest.mark.skipif(ON_CARD, reason="of CPUs")
@pytest.mark.parametrize("avx512", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_slow_type_is_said(
    dtype: str, avx512: bool, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    EngineArgs(model=str(MODEL), dtype=dtype).create_engine_config()  # type: ignore[arg-type]
    said = [m for m in messages if "--dtype float32 takes" in m]
    assert len(said) == (dtype != "float32" and not avx512)
    assert all(f"--dtype {dtype} is slow" in m for m in said)


def test_switched_off_with_a_reason(messages: list[str]) -> None:
    config = make_config(
        enable_prefix_caching=True, enable_chunked_prefill=True, async_scheduling=True
    )
    assert config.cache_config.enable_prefix_caching is False
    assert config.scheduler_config.enable_chunked_prefill is False
    assert config.scheduler_config.async_scheduling is False
    for feature in ("prefix caching", "chunked prefill", "async scheduling"):
        (line,) = [m for m in messages if m.startswith(f"{feature} is off: ")]
        assert len(line) > len(feature) + 20, "a reason is given"


@pytest.mark.parametrize("asked", [None, False, True])
def test_overlap_where_it_is_asked_for(
    asked: bool | None, monkeypatch: pytest.MonkeyPatch, messages: list[str]
) -> None:
    """As on a GPU: vLLM's default is on where nobody asked, which never ran there."""
    monkeypatch.setattr(engine_config, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    scheduler: Any = SimpleNamespace(async_scheduling=asked)
    engine_config._set_overlap(scheduler)
    assert scheduler.async_scheduling is bool(asked)
    assert len([m for m in messages if m.startswith("async scheduling is on: ")]) == bool(asked)


def test_defaults_without_any_option(messages: list[str]) -> None:
    config = make_config()
    assert "ElasticScheduler" in str(config.scheduler_config.scheduler_cls)
    assert not config.model_config.trust_remote_code
    assert config.scheduler_config.async_scheduling is False
    (line,) = [m for m in messages if m.startswith("LLaDAModelLM is decoded with ")]
    assert "preset block, policy elastic-block; " in line and "\n" not in line


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"max_model_len": 256}, True),
        ({"max_model_len": 257}, False),
        (
            {"max_model_len": 99, "additional_config": {"elastic": {"default_max_tokens": 64}}},
            False,
        ),
        ({"max_model_len": 99, "override_generation_config": {"max_new_tokens": 64}}, False),
    ],
)
def test_a_default_canvas_that_fits_nothing_is_said(
    options: dict[str, Any], warns: bool, messages: list[str]
) -> None:
    """A server with a short --max-model-len came up and refused every plain request."""
    make_config(**options)
    assert any("names no max_tokens is refused" in line for line in messages) is warns


def test_the_log_says_which_preset_and_policy_run(messages: list[str]) -> None:
    make_config(additional_config={"elastic": {"preset": "published", "gamma": 0.8}})
    (line,) = [m for m in messages if m.startswith("LLaDAModelLM is decoded with ")]
    assert line.endswith("preset published, policy elastic; set beside it: gamma=0.8")


def test_what_the_runner_is_told_travels_with_the_configuration() -> None:
    """vLLM sends it to workers, and hashes it as JSON for its fingerprint."""
    config = make_config(enforce_eager=True)
    sent = pickle.loads(pickle.dumps(config))
    told = RunnerOptions.of_engine(sent)
    assert told == RunnerOptions(graph_rows=[], whole_pass_rows=[], compiles=False)
    assert sent.compute_hash() == config.compute_hash()


def test_registering_twice_changes_nothing() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.engine.input_processor import InputProcessor

    from vllm_elastic.plugin import register

    def state() -> list[Any]:
        flags = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__
        return [*flags, InputProcessor.process_inputs, ModelRegistry.models["LLaDAModelLM"]]

    register()
    before = state()
    register()
    assert all(a is b for a, b in zip(state(), before, strict=True))


def test_llm_defaults(serve: Callable[[str], Served]) -> None:
    """`LLM.generate` without SamplingParams: greedy, with the default canvas."""
    engine: Any = serve("gqa-tied").engine
    defaults = engine.llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.max_tokens) == (0.0, 256)


@pytest.mark.parametrize(
    ("method", "asked"),
    [("add_lora", object()), ("remove_lora", 1), ("pin_lora", 1), ("list_loras", None)],
)
def test_a_worker_that_is_asked_for_adapters(
    serve: Callable[[str], Served], method: str, asked: object
) -> None:
    """The server asks without --enable-lora too: for --lora-modules."""
    engine: Any = serve("gqa-tied").engine
    with pytest.raises(Exception, match=r"start with --enable-lora \(vllm_elastic\)"):
        engine.llm.collective_rpc(method, args=() if asked is None else (asked,))


def test_llm_refuses_steps_that_could_commit_nothing(serve: Callable[[str], Served]) -> None:
    """Dream's schedule takes any number: a short answer would hold the engine for a million."""
    engine: Any = serve("gqa-tied").engine
    request = {"prompt_token_ids": [1] * 5, "max_tokens": 6, "elastic_alg": "entropy"}
    with pytest.raises(Exception, match="'elastic_steps' 7 is more than max_tokens 6"):
        engine.run([{**request, "elastic_steps": 7}])
    (result,) = engine.run([{**request, "elastic_steps": 6}])
    assert result["denoising_steps"] <= 6


@pytest.mark.parametrize("max_tokens", [200, 257])
def test_llm_refuses_a_canvas_beyond_the_model(
    serve: Callable[[str], Served], max_tokens: int
) -> None:
    engine: Any = serve("gqa-tied").engine
    with pytest.raises(
        Exception, match=f"max_tokens={max_tokens} .*is the canvas.* is 256"
    ) as info:
        engine.run([{"prompt_token_ids": [1] * 57, "max_tokens": max_tokens}])
    from vllm.exceptions import VLLMValidationError

    assert isinstance(info.value, VLLMValidationError)
    (result,) = engine.run([{"prompt_token_ids": [1] * 57, "max_tokens": 3}])
    assert result["passes"] >= 1


def test_cache_that_holds_no_full_canvas_ends_the_start() -> None:
    """So admission need not ask whether a canvas fits into the cache: that is vLLM's promise."""
    from vllm import LLM

    with pytest.raises(ValueError, match=r"To serve at least one request .*256"):
        LLM(
            model=str(MODEL),
            dtype="float32",
            max_model_len=256,
            kv_cache_memory_bytes=64 << 20,
            num_gpu_blocks_override=8,  # 32 positions each, and one is vLLM's own
        )


@pytest.mark.parametrize(
    ("requested", "answer"),
    [
        ("TURBOQUANT", "non-causal attention not supported"),
        ("TRITON_ATTN", "TritonAttentionBackend"),
        ("CUSTOM", "dtype not supported"),  # ours on xformers, asked for float32
    ],
)
def test_gpu_backend_attends_both_ways(
    requested: str, answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's own choice on a GPU: a backend that ignores `causal=False` is refused."""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import get_attn_backend

    config = make_config()
    config.attention_config.backend = AttentionBackendEnum[requested]
    monkeypatch.setattr("vllm.platforms.current_platform", pretended_card(monkeypatch))
    with set_current_vllm_config(config):
        try:
            found = get_attn_backend(64, torch.float32, "auto").__name__
        except ValueError as error:
            found = str(error)
    assert answer in found


def test_backend_that_cannot_attend_both_ways_is_told_with_those_that_can() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    make_config(attention_backend="TRITON_ATTN")
    with pytest.raises(ValueError, match="--attention-backend: TURBOQUANT cannot") as refused:
        make_config(attention_backend="TURBOQUANT")
    named = [each for each in AttentionBackendEnum if f" {each.name}" in str(refused.value)]
    assert len(named) == 4
    for backend in named:
        assert backend.name == "TURBOQUANT" or backend.get_class().supports_non_causal()


@pytest.mark.parametrize("backend", ["CPU_ATTN", "TRITON_ATTN", "FLEX_ATTENTION"])
def test_a_batchs_metadata_outlives_the_next_ones(
    backend: str, serve: Callable[[str], Served]
) -> None:
    """All layers would attend as the window's rows do in the last one, whose batch is prepared
    last: a backend is refused where vLLM's own builder does that. (FLASHINFER is not installed.)"""
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vllm_elastic.runner.batch import ONE_BATCH_AT_A_TIME

    runner = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    group = runner._attention_group
    spec, names = group.kv_cache_spec, group.layer_names
    builder_of = AttentionBackendEnum[backend].get_class().get_builder_cls()
    with set_current_vllm_config(runner.vllm_config):
        builder = builder_of(spec, names, runner.vllm_config, runner.device)

    def metadata(length: int) -> Any:
        starts, keys = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([length])
        return builder.build(
            0,
            CommonAttentionMetadata(
                query_start_loc=starts,
                query_start_loc_cpu=starts,
                seq_lens=keys.int(),
                seq_lens_cpu_upper_bound=keys.int(),
                num_reqs=1,
                num_actual_tokens=2,
                max_query_len=2,
                max_seq_len=length,
                block_table_tensor=torch.tensor([[1, 2]], dtype=torch.int32),
                slot_mapping=torch.zeros(2, dtype=torch.int64),
                causal=False,
            ),
        )

    first = metadata(40)
    metadata(33)
    kept = int(first.seq_lens[0]) == 40
    assert kept == (backend not in ONE_BATCH_AT_A_TIME)


@pytest.mark.parametrize("backend", ["FLASHINFER", "FLEX_ATTENTION"])
def test_backend_that_prepares_one_batch_at_a_time(
    backend: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by its name before anything is loaded, and where vLLM chose it by itself."""
    with pytest.raises(ValueError, match=f"--attention-backend: {backend} prepares one batch"):
        make_config(attention_backend=backend)
    monkeypatch.setattr(CPUAttentionBackend, "get_name", staticmethod(lambda: backend))
    with pytest.raises(RuntimeError, match=f"vLLM chose the attention backend {backend}"):
        make_engine(serve("gqa-tied").directory)


def test_canvas_larger_than_the_row_budget(serve: Callable[[str], Served]) -> None:
    """In row chunks inside each layer, with the oracle's tokens and passes."""
    from vllm_elastic.bench.engine import BenchEngine

    served = serve("gqa-tied")
    engine = BenchEngine(
        served.directory,
        batch_size=4,
        max_model_len=256,
        row_budget=64,
        kv_cache_memory_bytes=32 << 20,
        elastic_config=ORACLES_DEFAULTS,
    )
    assert engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens == 64
    poison(engine)
    generator = torch.Generator().manual_seed(8)
    requests, expected = [], []
    for size, config in (
        (170, {"policy": "none"}),
        (177, {"policy": "elastic", "gamma": 0.8}),
        (191, {"policy": "elastic", "gamma": 1.1, "statistic": "paper", "window": 5}),
        (129, {"policy": "dual-cache", "block_length": 8}),
        (20, {"policy": "elastic", "gamma": 0.9}),
    ):
        prompt = torch.randint(0, MASK, (size,), generator=generator).tolist()
        knobs = {f"elastic_{key}": value for key, value in config.items()}
        requests.append({"prompt_token_ids": prompt, "max_tokens": 24, **knobs})
        expected.append(ask_oracle(served, prompt, 24, config))
    for result, wanted in zip(engine.run(requests), expected, strict=True):
        assert result["token_ids"] == wanted.token_ids
        assert result["steps"] == wanted.steps
        assert result["row_layers"] == wanted.row_layers


# A model that is no dLLM.

LLAMA = """
import json, sys
from vllm import LLM, SamplingParams

def answers(directory):
    llm = LLM(model=directory, dtype="float32", max_model_len=128, skip_tokenizer_init=True,
              enforce_eager=True, kv_cache_memory_bytes=16 << 20, disable_log_stats=True)
    params = [SamplingParams(temperature=0.0, max_tokens=20, detokenize=False),
              SamplingParams(temperature=0.9, seed=5, max_tokens=20, detokenize=False)]
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (4, 40)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    core = llm.llm_engine.engine_core.engine_core
    kind = type(core.scheduler)
    from vllm.engine.arg_utils import EngineArgs
    return {"tokens": [list(o.outputs[0].token_ids) for o in outputs],
            "scheduler": f"{kind.__module__}.{kind.__qualname__}",
            "prefix_caching": llm.llm_engine.vllm_config.cache_config.enable_prefix_caching,
            "plugin": hasattr(EngineArgs.add_cli_args, "_vllm_elastic_wrapped")}
"""


@pytest.mark.slow
def test_other_models_are_untouched(tmp_path: Path) -> None:
    """A Llama: in this process with the plugin, in another one without; same answers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=128,  # heads of 32: the least that CPU attention has
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    directory = str(tmp_path / "llama")
    script = tmp_path / "llama.py"
    script.write_text(
        LLAMA + "\nif __name__ == '__main__':\n"
        "    json.dump(answers(sys.argv[1]), open(sys.argv[2], 'w'))\n"
    )
    out = tmp_path / "stock.json"
    stock = subprocess.Popen(
        [sys.executable, str(script), directory, str(out)],
        env=os.environ | {"VLLM_PLUGINS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        namespace: dict[str, Any] = {}
        exec(LLAMA, namespace)
        with_plugin = namespace["answers"](directory)
        log, _ = stock.communicate(timeout=240)
    finally:
        stock.kill()
    assert stock.returncode == 0, log
    without_plugin = json.loads(out.read_text())
    assert (with_plugin.pop("plugin"), without_plugin.pop("plugin")) == (True, False)
    assert with_plugin == without_plugin
    assert with_plugin["scheduler"].startswith("vllm.v1.core.sched.")
    assert len(set(with_plugin["tokens"][0])) > 3, "an answer that could tell a difference"
