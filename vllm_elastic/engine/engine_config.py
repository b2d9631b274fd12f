# SPDX-License-Identifier: Apache-2.0
"""What vLLM's configuration becomes for a model of ours: what is switched off, set, or refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import CpuArchEnum, current_platform
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_elastic.config import BLOCK_SIZE, ElasticConfig, elastic_config_of
from vllm_elastic.decoding.schedule import growth_of
from vllm_elastic.engine.flag_rules import refuse_flags
from vllm_elastic.engine.image_renderer import render_images
from vllm_elastic.engine.optimisations import runner_options
from vllm_elastic.engine.request_defaults import set_request_defaults
from vllm_elastic.models.registry import FAMILIES, traits_of
from vllm_elastic.models.shares import undivided_by
from vllm_elastic.runner.batch import ONE_BATCH_AT_A_TIME
from vllm_elastic.runner.options import RUNNER_OPTIONS

if TYPE_CHECKING:
    from vllm.config import SchedulerConfig, VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.engine_config")

_CPU_HEAD_SIZES = CPUAttentionBackend.get_supported_head_sizes()
_CPU_BLOCK_SIZE: int = CPUAttentionBackend.get_supported_kernel_block_sizes()[0].base

_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "CUSTOM")
"""Attention backends for CUDA that serve; the last one is ours on xformers."""

SCHEDULER = "vllm_elastic.engine.scheduler.ElasticScheduler"

END_OF_TURN = "<|eot_id|>"
"""The end-of-turn token where a configuration class has no ``end_of_turn``: LLaDA-8B's 126348."""


class DiffusionEngineConfig(VerifyAndUpdateConfig):
    """vLLM calls this for each of the ``FAMILIES`` before it builds anything."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the configuration and put our scheduler and worker in place.

        Raises:
            ValueError: a feature that needs left-to-right decoding or is not built yet; the
                message names the flag and the remedy.
        """
        elastic = elastic_config_of(vllm_config)
        refuse_flags(vllm_config)
        _refuse_unsupported(vllm_config, elastic)
        model, cache = vllm_config.model_config, vllm_config.cache_config
        scheduler, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        scheduler.scheduler_cls = SCHEDULER
        parallel.worker_cls = "vllm_elastic.engine.worker.ElasticWorker"
        if cache.enable_prefix_caching:
            logger.info(
                "prefix caching is off: attention is bidirectional, so a prompt's keys and "
                "values depend on the answer"
            )
        cache.enable_prefix_caching = False
        if scheduler.enable_chunked_prefill:
            logger.info(
                "chunked prefill is off: a canvas is computed as a whole; beyond the row budget "
                "(max_num_batched_tokens=%d) in row chunks inside each layer",
                scheduler.max_num_batched_tokens,
            )
        scheduler.enable_chunked_prefill = False
        _set_overlap(scheduler)
        _set_engines_apart(vllm_config)
        if not cache.user_specified_block_size:
            cache.block_size = BLOCK_SIZE
            cache.user_specified_block_size = True
        # vLLM then refuses a backend that would ignore `causal=False`.
        vllm_config.attention_config.use_non_causal = True
        options = runner_options(vllm_config)
        vllm_config.additional_config = vllm_config.additional_config | {RUNNER_OPTIONS: options}
        if counts := options.graph_rows:
            logger.info(
                "CUDA graphs of each layer are captured for %d numbers of rows up to %d; vLLM's "
                "own graphs and compilation are off",
                len(counts),
                counts[-1],
            )
        model.enforce_eager = True
        if traits_of(model.hf_config).image_token_id is not None:
            render_images(vllm_config)
        if model.dtype in (torch.bfloat16, torch.float16) and not _multiplies_in_16_bits():
            logger.warning(
                "--dtype %s is slow on this CPU, which has no AVX-512: --dtype float32 takes twice "
                "the memory, and took the test model a third of the time",
                str(model.dtype).removeprefix("torch."),
            )
        set_request_defaults(vllm_config, elastic)
        _find_ends(vllm_config)
        logger.info("%s is decoded with %s", model.architecture, elastic.summary())


def _multiplies_in_16_bits() -> bool:
    """Whether the device has products of 16-bit numbers; an x86 without AVX-512 works them out
    number by number."""
    x86 = current_platform.is_cpu() and current_platform.get_cpu_architecture() == CpuArchEnum.X86
    return not x86 or torch.cpu._is_avx512_supported()


def _set_overlap(scheduler: SchedulerConfig) -> None:
    """Let steps overlap only where it is asked for: two groups of requests read the weights twice,
    and whether a busier host makes that good depends on the card."""
    scheduler.async_scheduling = bool(scheduler.async_scheduling)  # vLLM would take None for yes
    if not scheduler.async_scheduling:
        return
    if current_platform.is_cpu():
        logger.info("async scheduling is off: vLLM has none on CPUs")  # it sees to that itself
    else:
        logger.info(
            "async scheduling is on: while a pass of one group of requests runs, the next one's is "
            "planned"
        )


def _set_engines_apart(vllm_config: VllmConfig) -> None:
    """Data-parallel engines with experts, too, share nothing (``models.experts``).

    vLLM would start and stop them together and let them wait for each other every so many passes
    (``--dp-sync-interval``), a request at an idle engine for a busy one. It knows a mixture of
    experts by their number, and asks again wherever it matters. An external load balancer is for
    such models only, so there they stay together.
    """
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and not parallel.data_parallel_external_lb:
        vllm_config.model_config.model_arch_config.num_experts = 0


def is_served_by_us(vllm_config: VllmConfig) -> bool:
    """Whether this engine runs our scheduler."""
    return bool(vllm_config.scheduler_config.scheduler_cls == SCHEDULER)


def _find_ends(vllm_config: VllmConfig) -> None:
    """A config.json does not name the tokens that end a turn or an answer; the tokenizer does."""
    model = vllm_config.model_config
    config = model.hf_config
    if model.skip_tokenizer_init:
        return
    vocabulary = cached_tokenizer_from_config(model).get_vocab()
    if getattr(config, "eot_token_id", None) is None:
        config.eot_token_id = vocabulary.get(getattr(config, "end_of_turn", END_OF_TURN))
    stops = getattr(config, "stop_tokens", ())
    config.stop_ids = [vocabulary[token] for token in stops if token in vocabulary]


def _splits_tower(vllm_config: VllmConfig) -> bool:
    """Whether ranks would have to share an attention head of the image tower."""
    model = vllm_config.model_config
    tower = getattr(model.hf_config, "vision_config", None)
    if tower is None or model.multimodal_config.mm_encoder_tp_mode == "data":
        return False
    uneven = tower.num_attention_heads % vllm_config.parallel_config.tensor_parallel_size
    return bool(uneven)


def _fault_of(backend: AttentionBackendEnum | None) -> str:
    """Why a backend that the operator chose cannot serve, or nothing; one that is not installed is
    left to vLLM."""
    if backend is None:
        return ""
    if backend.name in ONE_BATCH_AT_A_TIME:
        return "prepares one batch at a time, and a pass attends in several"
    try:
        return "" if backend.get_class().supports_non_causal() else "cannot attend both ways"
    except ImportError:
        return ""


def _refuse_unsupported(vllm_config: VllmConfig, elastic: ElasticConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    head_dim = model.get_head_size()
    tp_size = parallel.tensor_parallel_size
    undivided = undivided_by(vllm_config.model_config.hf_config, tp_size)
    stride = elastic.hidden_stride
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    layers = vllm_config.model_config.hf_config.num_hidden_layers
    cache, scheduler = vllm_config.cache_config, vllm_config.scheduler_config
    backend = vllm_config.attention_config.backend
    fault = _fault_of(backend)
    problems = {
        "--attention-backend": (
            bool(fault),
            f"{backend and backend.name} {fault}; leave it out, or take {', '.join(_BACKENDS)}",
        ),
        "--max-num-scheduled-tokens": (
            (scheduler.max_num_scheduled_tokens or 0) > scheduler.max_num_batched_tokens,
            f"{scheduler.max_num_scheduled_tokens} is more than --max-num-batched-tokens "
            f"{scheduler.max_num_batched_tokens}, the rows of a step that memory is measured for; "
            "lower it, or raise that one",
        ),
        "--block-size": (
            cache.user_specified_block_size
            and current_platform.is_cpu()
            and bool(cache.block_size % _CPU_BLOCK_SIZE),
            f"{cache.block_size} is no multiple of {_CPU_BLOCK_SIZE}, which vLLM's CPU attention "
            "needs",
        ),
        "--model": (
            current_platform.is_cpu() and head_dim not in _CPU_HEAD_SIZES,
            f"vLLM's CPU attention has no kernel for head size {head_dim}, only for "
            f"{', '.join(map(str, _CPU_HEAD_SIZES))}",
        ),
        "--tensor-parallel-size": (
            bool(undivided),
            f"{tp_size} ranks cannot share {undivided} evenly; take a number that divides them",
        ),
        "--mm-encoder-tp-mode": (
            _splits_tower(vllm_config),
            f"{tp_size} ranks cannot share the image tower's heads evenly; take data, which leaves "
            "the tower whole on each rank",
        ),
        "--elastic-config": (
            1 < stride >= layers,
            f"hidden_stride {stride} stores no hidden state of a model of {layers} layers, so no "
            f"refresh could save a layer; lower it to at most {layers - 1}",
        ),
        "--enable-lora": (
            vllm_config.lora_config is not None and not FAMILIES[model.architecture].takes_adapters,
            f"a {model.architecture} takes no adapters; merge the adapter's weights into the "
            "checkpoint",
        ),
        "--kv-cache-dtype": (
            # vLLM writes the model's numbers into it as they are.
            cache.cache_dtype not in ("auto", dtype),
            f"keys and values of another type than the model's ({dtype}) are not supported; take "
            "that one, whatever a quantised checkpoint says",
        ),
    }
    for flag, (present, reason) in problems.items():
        if present:
            raise ValueError(f"{flag}: {reason} (vllm_elastic).")
    try:
        growth_of(elastic, traits_of(model.hf_config).grow_by)
    except ValueError as error:
        raise ValueError(f"--elastic-config: {error}") from None
