# SPDX-License-Identifier: Apache-2.0
"""The table of flags against the installed vLLM and the docs, and what it refuses at start."""

from __future__ import annotations

import dataclasses
import typing
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import vllm

from tests.tiny_llada_v import TinyLLaDAV
from vllm_elastic.engine.flag_rules import GROUPS, ONLY_IN, REFUSED, all_flags, page, refuse_flags

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny_llada" / "checkpoint"
RELEASE = tuple(int(part) for part in vllm.__version__.split(".")[:2])

CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2}

# How a user sets each refused flag.
SET: dict[str, dict[str, Any]] = {
    "--pipeline-parallel-size": {"pipeline_parallel_size": 2},
    "--decode-context-parallel-size": {
        "decode_context_parallel_size": 2,
        "tensor_parallel_size": 2,
    },
    "--prefill-context-parallel-size": {"prefill_context_parallel_size": 2},
    "--enable-expert-parallel": {"enable_expert_parallel": True},
    "--enable-dbo": {"enable_dbo": True},
    "--ubatch-size": {"ubatch_size": 2},
    "--speculative-config": {"speculative_config": SPECULATIVE},
    "--diffusion-config": {"diffusion_config": {"canvas_length": 32}},
    "--fully-sharded-loras": {"enable_lora": True, "fully_sharded_loras": True},
    "--enable-tower-connector-lora": {"enable_lora": True, "enable_tower_connector_lora": True},
    "--logits-processors": {"logits_processors": ["a.module:Processor"]},
    "--watermark-config": {"watermark_config": {"key": 1}},
    "--logprobs-mode": {"logprobs_mode": "processed_logprobs"},
    "--return-sampling-mask": {"return_sampling_mask": True},
    "--enable-trace-replay": {"enable_trace_replay": True},
    "--enable-prompt-embeds": {"enable_prompt_embeds": True},
    "--enable-return-routed-experts": {"enable_return_routed_experts": True},
    "--runner": {"runner": "pooling"},
    "--pooler-config": {"pooler_config": {}},
    "--scheduler-cls": {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
    "--worker-cls": {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"},
    "--long-prefill-token-threshold": {"long_prefill_token_threshold": 64},
    "--long-prefill-token-threshold-adaptive": {"long_prefill_token_threshold_adaptive": True},
    "--kv-transfer-config": {"kv_transfer_config": CONNECTOR},
    "--kv-offloading-size": {"kv_offloading_size": 1.0},
    "--ec-transfer-config": {"ec_transfer_config": {}},
    "--kv-events-config": {"kv_events_config": {"enable_kv_cache_events": True}},
    "--kv-sharing-fast-prefill": {"kv_sharing_fast_prefill": True},
    "--mm-encoder-only": {"mm_encoder_only": True},
    "--mm-processor-kwargs": {"mm_processor_kwargs": {"do_resize": False}},
    "--mm-processor-cache-type": {"mm_processor_cache_type": "shm"},
    "--offload-backend": {"offload_backend": "uva"},
    "--cpu-offload-gb": {"cpu_offload_gb": 1},
    "--offload-group-size": {"offload_group_size": 2},
    "--enable-logging-iteration-details": {"enable_logging_iteration_details": True},
    "--enable-mfu-metrics": {"enable_mfu_metrics": True},
    "--cudagraph-metrics": {"cudagraph_metrics": True},
    "--enable-layerwise-nvtx-tracing": {"enable_layerwise_nvtx_tracing": True},
}


def make_config(model: Path = MODEL, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(model), dtype="float32", **options).create_engine_config()


@pytest.fixture(scope="module")
def llada_v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes images."""
    directory = tmp_path_factory.mktemp("llada_v")
    TinyLLaDAV().save(directory)
    return directory


def installed_flags() -> set[str]:
    """Of `vllm serve`, by their first long name."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    names = set()
    for action in parser._actions:
        long = [name for name in action.option_strings if name.startswith("--")]
        names.add(long[0] if long else action.dest)
    return names


def test_every_flag_is_decided_on() -> None:
    """A flag that a new vLLM brings would be accepted and ignored."""
    decided = set(all_flags())
    installed = installed_flags()
    assert installed - decided == set(), "decide what becomes of them: engine/flag_rules.py"
    later = {flag for flag, first in ONLY_IN.items() if _release(first) > RELEASE}
    assert decided - installed == later, "vLLM no longer has them"


def _release(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split("."))


# Fields of vLLM's configuration that no flag of their name sets: other flags' or vLLM's own.
NOT_OF_A_FLAG = {
    "model_config": "model_weights multimodal_config spec_target_max_model_len",
    "cache_config": "cache_dtype is_attention_free mamba_page_size_padded sliding_window "
    "skip_page_size_padded",
    "parallel_config": "assigned_physical_gpu_ids data_parallel_master_ip "
    "data_parallel_master_port data_parallel_rank_local is_moe_model placement_group rank "
    "ray_runtime_env",
    "scheduler_config": "is_multimodal_model policy runner_type",
    "device_config": "device",
    "load_config": "device",
    "offload_config": "prefetch uva",
    "mamba_config": "backend enable_stochastic_rounding ssu_algorithm "
    "stochastic_rounding_philox_rounds",
    "lora_config": "target_modules",
    "observability_config": "enable_mm_processor_stats",
}


def test_every_field_of_the_configuration_is_decided_on() -> None:
    """By a flag of its name, or with its whole class by a flag that takes JSON."""
    from vllm.config import VllmConfig

    flags = set(all_flags())
    hints = typing.get_type_hints(VllmConfig)
    left: dict[str, set[str]] = {}
    for field in dataclasses.fields(VllmConfig):
        if _flag(field.name) in flags:
            continue
        hint = hints[field.name]
        for kind in filter(dataclasses.is_dataclass, typing.get_args(hint) or (hint,)):
            names = {f.name for f in dataclasses.fields(kind) if f.init and f.name[0] != "_"}
            undecided = {name for name in names if _flag(name) not in flags}
            undecided -= set(NOT_OF_A_FLAG.get(field.name, "").split())
            if undecided:
                left[field.name] = undecided
    assert not left, "decide what becomes of them: engine/flag_rules.py"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def test_no_flag_is_decided_on_twice() -> None:
    flags = all_flags()
    assert sorted(flags) == sorted(set(flags))


def test_rules_say_something() -> None:
    for group in GROUPS:
        assert group.status in ("works", "ours", "no effect"), group.flags
        assert group.note or group.status == "works", group.flags


def test_fields_exist_and_plain_configurations_are_fine(llada_v: Path) -> None:
    """A field that a release renames would no longer be looked at."""
    refuse_flags(make_config())
    plain, adapted = make_config(llada_v), make_config(enable_lora=True)
    for flag, rule in REFUSED.items():
        config = adapted if rule.field.startswith("lora_config.") else plain
        value = reduce(getattr, rule.field.split("."), config)
        assert value in rule.fine, flag


def test_page_is_current() -> None:
    written_by = "python -m vllm_elastic.engine.flag_rules > docs/flags.md"
    assert (ROOT / "docs/flags.md").read_text() == page(), written_by


def test_each_refused_flag_is_tried() -> None:
    assert {*SET, "--model-impl"} == set(REFUSED)


@pytest.mark.parametrize("flag", SET)
def test_refused_at_start(flag: str, llada_v: Path) -> None:
    model = llada_v if flag.startswith("--mm-") else MODEL
    with pytest.raises(ValueError, match=rf"{flag}[,:].* \(vllm_elastic\)"):
        make_config(model, **SET[flag])


def test_ranks_that_cannot_share_the_tower(llada_v: Path) -> None:
    """Two heads among four ranks; each may have all of it."""
    with pytest.raises(ValueError, match=r"--mm-encoder-tp-mode: 4 ranks .* take data"):
        make_config(llada_v, tensor_parallel_size=4)
    assert make_config(llada_v, tensor_parallel_size=4, mm_encoder_tp_mode="data")


def test_a_tokenizer_that_cannot_place_images(llada_v: Path) -> None:
    with pytest.raises(ValueError, match="--tokenizer-mode: mistral cannot place images"):
        make_config(llada_v, tokenizer_mode="mistral")


def test_convert_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--runner, --convert: .* \(vllm_elastic\)"):
        make_config(convert="embed")


def test_another_implementation_is_refused() -> None:
    """vLLM itself finds none in the Transformers library, so far."""
    config = make_config()
    config.model_config.model_impl = "transformers"
    with pytest.raises(ValueError, match=r"--model-impl: .* \(vllm_elastic\)"):
        refuse_flags(config)


@pytest.mark.parametrize("size", [48, 16])
def test_block_size_that_no_kernel_takes(size: int) -> None:
    with pytest.raises(ValueError, match=f"--block-size: {size} is no multiple of 32, .*elastic"):
        make_config(block_size=size)
    assert make_config(block_size=64).cache_config.block_size == 64
