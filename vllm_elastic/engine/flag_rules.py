# SPDX-License-Identifier: Apache-2.0
"""What becomes of every flag of ``vllm serve``, and so of every keyword of ``LLM``.

A flag works, is refused at start, has no effect for a LLaDA, or has a meaning of its own. A test
holds this against the installed vLLM, so that a new release's flag is decided on before it is
taken.
``python -m vllm_elastic.engine.flag_rules`` prints docs/flags.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any


@dataclass(frozen=True)
class Group:
    """Flags with one fate.

    Attributes:
        flags: names, one space between them.
        status: ``works`` (as in stock), ``ours`` (works, with a meaning of its own), ``no effect``.
        note: what differs, or why there is none.
    """

    flags: str
    status: str
    note: str = ""


@dataclass(frozen=True)
class Refusal:
    """A flag that ends the start where it is set.

    Attributes:
        field: of vLLM's ``VllmConfig``, where the flag can be seen; a dot for each level.
        fine: values of the field that ask for nothing.
        reason: why, and what to do instead.
        also: other flags that end up in the same field.
    """

    field: str
    reason: str
    fine: tuple[Any, ...] = (None,)
    also: tuple[str, ...] = ()


_GENERATE = "the model generates text, it is no pooling model; leave it out"
_CONNECTOR = "KV connectors move causal caches, which are not valid here; leave it out"
_ONE_LOADER = "weights stay where they are loaded; leave it out, or take more ranks"
_OFF = (False, None)

REFUSED: dict[str, Refusal] = {
    # what is not built, or needs left-to-right decoding
    "--pipeline-parallel-size": Refusal(
        "parallel_config.pipeline_parallel_size",
        "pipeline parallelism is not supported; leave it at 1",
        (1,),
    ),
    "--decode-context-parallel-size": Refusal(
        "parallel_config.decode_context_parallel_size",
        "decode context parallelism splits a causal cache; leave it at 1",
        (1,),
    ),
    "--prefill-context-parallel-size": Refusal(
        "parallel_config.prefill_context_parallel_size",
        "prefill context parallelism splits a causal prompt; leave it at 1",
        (1,),
    ),
    "--enable-expert-parallel": Refusal(
        "parallel_config.enable_expert_parallel",
        "experts are not spread over ranks, every rank has a share of each; leave it out",
        _OFF,
    ),
    "--enable-dbo": Refusal(
        "parallel_config.enable_dbo", "a pass is not split into two batches; leave it out", _OFF
    ),
    "--ubatch-size": Refusal(
        "parallel_config.ubatch_size", "a pass is not split into batches; leave it at 0", (0,)
    ),
    "--speculative-config": Refusal(
        "speculative_config",
        "speculative decoding needs left-to-right decoding; a denoising step commits several "
        "tokens already",
        also=("--spec-method", "--spec-model", "--spec-tokens"),
    ),
    "--diffusion-config": Refusal(
        "diffusion_config",
        "it is for vLLM's own diffusion models; set knobs with --elastic-config",
    ),
    "--fully-sharded-loras": Refusal(
        "lora_config.fully_sharded_loras",
        "each rank has the whole of an adapter's smaller matrix; leave it out",
        _OFF,
    ),
    "--enable-tower-connector-lora": Refusal(
        "lora_config.enable_tower_connector_lora",
        "adapters change the language model only; leave it out",
        _OFF,
    ),
    "--logits-processors": Refusal(
        "model_config.logits_processors",
        "logits processors see one token at a time; use logit_bias, allowed_token_ids or bad_words",
        (None, [], ()),
    ),
    "--watermark-config": Refusal(
        "watermark_config", "a watermark needs left-to-right decoding; leave it out"
    ),
    "--logprobs-mode": Refusal(
        "model_config.logprobs_mode",
        "log probabilities are of what the model says, before any constraint; leave it at "
        "raw_logprobs",
        ("raw_logprobs",),
    ),
    "--return-sampling-mask": Refusal(
        "model_config.return_sampling_mask", "no masks are kept; leave it out", _OFF
    ),
    "--enable-trace-replay": Refusal(
        "model_config.enable_trace_replay",
        "a trace is replayed from left to right; leave it out",
        _OFF,
    ),
    "--enable-prompt-embeds": Refusal(
        "model_config.enable_prompt_embeds", "a canvas needs token ids; leave it out", _OFF
    ),
    "--enable-return-routed-experts": Refusal(
        "aux_output_config.enable_return_routed_experts",
        "no routes are kept; leave it out",
        _OFF,
        also=("--aux-output-config",),
    ),
    "--runner": Refusal("model_config.runner_type", _GENERATE, ("generate",), also=("--convert",)),
    "--pooler-config": Refusal("model_config.pooler_config", _GENERATE),
    "--model-impl": Refusal(
        "model_config.model_impl",
        "only this package's model can decode a canvas; leave it at auto",
        ("auto", "vllm"),
    ),
    "--scheduler-cls": Refusal(
        "scheduler_config.scheduler_cls",
        "a canvas needs this package's scheduler; leave it out",
        (None, "vllm_elastic.engine.scheduler.ElasticScheduler"),
    ),
    "--worker-cls": Refusal(
        "parallel_config.worker_cls",
        "a canvas needs this package's worker; leave it out, or use --worker-extension-cls",
        ("auto", "vllm_elastic.engine.worker.ElasticWorker"),
    ),
    "--long-prefill-token-threshold": Refusal(
        "scheduler_config.long_prefill_token_threshold",
        "a canvas is computed as a whole; leave it at 0, and bound a step's rows with "
        "--max-num-batched-tokens",
        (0,),
    ),
    "--long-prefill-token-threshold-adaptive": Refusal(
        "scheduler_config.long_prefill_token_threshold_adaptive",
        "a canvas is computed as a whole; leave it out",
        _OFF,
    ),
    # the cache
    "--kv-transfer-config": Refusal("kv_transfer_config", _CONNECTOR),
    "--kv-offloading-size": Refusal("cache_config.kv_offloading_size", _CONNECTOR),
    "--ec-transfer-config": Refusal(
        "ec_transfer_config", "images are encoded where they are decoded; leave it out"
    ),
    "--kv-events-config": Refusal(
        "kv_events_config", "its events are those of the prefix cache, which is off; leave it out"
    ),
    "--kv-sharing-fast-prefill": Refusal(
        "cache_config.kv_sharing_fast_prefill", "no two layers share keys; leave it out", _OFF
    ),
    # images
    "--mm-encoder-only": Refusal(
        "model_config.multimodal_config.mm_encoder_only",
        "images are encoded where they are decoded; leave it out",
        _OFF,
    ),
    "--mm-processor-kwargs": Refusal(
        "model_config.multimodal_config.mm_processor_kwargs",
        "images are cut as config.json says; change image_aspect_ratio or image_grid_pinpoints in "
        "it",
        (None, {}),
    ),
    "--mm-processor-cache-type": Refusal(
        "model_config.multimodal_config.mm_processor_cache_type",
        "a preempted request's image is sent to the workers once more, and shared memory keeps it "
        "only until the first time; leave it at lru",
        (None, "lru"),
    ),
    # weights elsewhere
    "--offload-backend": Refusal("offload_config.offload_backend", _ONE_LOADER, ("auto",)),
    "--cpu-offload-gb": Refusal("offload_config.uva.cpu_offload_gb", _ONE_LOADER, (0,)),
    "--offload-group-size": Refusal(
        "offload_config.prefetch.offload_group_size", _ONE_LOADER, (0,)
    ),
    # numbers that would mislead
    "--enable-logging-iteration-details": Refusal(
        "observability_config.enable_logging_iteration_details",
        "it would call a pass's rows generated tokens; vllm:elastic_* on /metrics count passes and "
        "rows",
        _OFF,
    ),
    "--enable-mfu-metrics": Refusal(
        "observability_config.enable_mfu_metrics",
        "it counts tokens of a causal model; vllm:elastic_row_layers_total on /metrics is the work",
        _OFF,
    ),
    "--cudagraph-metrics": Refusal(
        "observability_config.cudagraph_metrics", "no such metrics are kept; leave it out", _OFF
    ),
    "--enable-layerwise-nvtx-tracing": Refusal(
        "observability_config.enable_layerwise_nvtx_tracing",
        "the runner sets no marks; leave it out, or take --profiler-config",
        _OFF,
    ),
}

GROUPS: tuple[Group, ...] = (
    Group(
        "--plugin --elastic-config", "ours", "how a canvas is decoded: [knobs](configuration.md)"
    ),
    Group(
        "--additional-config",
        "ours",
        "its `elastic` is `--elastic-config`; other keys are not ours",
    ),
    Group(
        "--block-size",
        "ours",
        "positions of a KV block, 32 by default; on a CPU a multiple of 32. What is refreshed as a "
        "whole has `granularity` positions",
    ),
    Group("--seed", "ours", "seeds of requests that name none, drawn in the order of admission"),
    Group(
        "--generation-config --override-generation-config",
        "ours",
        "temperature 0 and the default canvas stand before the model's own file, and an operator's "
        "values before both; penalties are refused, those of the model's own file passed over",
    ),
    Group(
        "--max-num-batched-tokens --max-num-scheduled-tokens",
        "ours",
        "rows a step; a canvas of more rows is computed alone, in chunks inside each layer",
    ),
    Group("--tensor-parallel-size", "ours", "a number that divides heads, MLP and vocabulary"),
    Group(
        "--kv-cache-dtype",
        "ours",
        "`auto`, or the model's own type, which keys have whatever a quantised checkpoint says",
    ),
    Group("--enable-prefix-caching", "no effect", "attention is bidirectional; a log line says so"),
    Group(
        "--prefix-caching-hash-algo --prefix-cache-retention-interval --prefix-match-unit "
        "--kv-offloading-backend --kv-cache-dtype-skip-layers --swa-bounded-replay "
        "--enable-prompt-tokens-details",
        "no effect",
        "there is no prefix cache to keep, match or offload",
    ),
    Group(
        "--enable-chunked-prefill --scheduler-reserve-full-isl --prefill-schedule-interval "
        "--disable-chunked-mm-input",
        "no effect",
        "a canvas is admitted and computed as a whole; a log line says so",
    ),
    Group(
        "--async-scheduling",
        "ours",
        "on a GPU, and only where it is given: two groups of requests, of which one is planned "
        "while the other one's pass runs",
    ),
    Group(
        "--enforce-eager --cudagraph-capture-sizes --max-cudagraph-capture-size",
        "ours",
        "on a GPU: the rows of a pass for which each layer's graphs are captured, 512 at most "
        "unless you say more; a number stands for the next one that passes are filled up to. On a "
        "CPU eager is without compiled layers",
    ),
    Group(
        "--compilation-config --optimization-level",
        "ours",
        "of them `cudagraph_mode` switches graphs off (`NONE`) or, where it is named, on with "
        "several ranks (`PIECEWISE`) and for whole passes too (`FULL_AND_PIECEWISE`); `mode` (0) "
        "switches compiled layers off, and level 0 both",
    ),
    Group(
        "--performance-mode --enable-flashinfer-autotune --disable-cascade-attn "
        "--jit-monitor-mode --jit-monitor-verbose --monokernel",
        "no effect",
        "of what vLLM compiles or tunes there is nothing here",
    ),
    Group("--use-fp64-gumbel", "no effect", "it is always in float64"),
    Group(
        "--dbo-decode-token-threshold --dbo-prefill-token-threshold --dcp-comm-backend "
        "--dcp-q-replicate --dcp-kv-cache-interleave-size --cp-kv-cache-interleave-size "
        "--enable-hc-sp --enable-batch-sharded-sampling",
        "no effect",
        "they belong to ways of sharing a model that are refused or not built",
    ),
    Group(
        "--enable-ep-weight-filter --all2all-backend --enable-elastic-ep "
        "--elastic-ep-max-dp-size --enable-eplb --eplb-config --expert-placement-strategy "
        "--dp-sync-interval --disable-nccl-for-dp-synchronization",
        "no effect",
        "without --enable-expert-parallel, which is refused",
    ),
    Group(
        "--enable-lora --lora-modules --max-loras --max-lora-rank --lora-dtype --max-cpu-loras "
        "--lora-target-modules",
        "works",
        "[adapters](adapters.md)",
    ),
    Group(
        "--specialize-active-lora --enable-mixed-moe-lora-format --enable-moe-shared-loras "
        "--default-mm-loras --max-lora-cls-labels",
        "no effect",
        "they are for kernels and models that have no adapters here",
    ),
    Group(
        "--cpu-offload-params --offload-num-in-group --offload-prefetch-step --offload-params",
        "no effect",
        "without --cpu-offload-gb or --offload-group-size, which are refused",
    ),
    Group(
        "--mamba-backend --mamba-ssu-algorithm --enable-mamba-cache-stochastic-rounding "
        "--mamba-cache-philox-rounds --mamba-cache-dtype --mamba-ssm-cache-dtype "
        "--mamba-block-size --mamba-cache-mode --enable-mamba-shared-prefix-checkpoint "
        "--replayssm-buffer-len --use-replayssm --gdn-prefill-backend --kda-prefill-backend "
        "--kda-decode-backend --sparse-indexer-topk-backend --engram-config "
        "--disable-sliding-window --disable-hybrid-kv-cache-manager",
        "no effect",
        "every layer of the model attends to the whole canvas",
    ),
    Group(
        "--language-model-only --limit-mm-per-prompt --enable-mm-embeds --media-io-kwargs "
        "--mm-processor-cache-gb --mm-hasher-algorithm --mm-encoder-tp-mode "
        "--interleave-mm-strings --allowed-local-media-path --allowed-media-domains",
        "works",
        "with a LLaDA-V ([images](images.md)); other models take text only",
    ),
    Group(
        "--mm-encoder-attn-backend --mm-encoder-attn-dtype --mm-encoder-fp8-scale-path "
        "--mm-encoder-fp8-scale-save-path --mm-encoder-fp8-scale-save-margin --mm-tensor-ipc",
        "works",
        "with a LLaDA-V; no part of it is ours, not tested here",
    ),
    Group(
        "--mm-shm-cache-max-object-size-mb --skip-mm-profiling --video-pruning-rate "
        "--video-pruning-method --mm-processor-device --mm-ipc-gpu-memory-gb "
        "--mm-device-do-normalize --trust-request-mm-kwargs --ec-manager-config",
        "no effect",
        "they are for other encoders and caches than LLaDA-V's",
    ),
    Group(
        "--io-processor-plugin --enable-flash-late-interaction", "no effect", "of pooling models"
    ),
    Group(
        "--reasoning-config --per-request-spec-decode-metrics "
        "--cohere-is-reasoning-model --cohere-format --reasoning-effort-map "
        "--anthropic-disabled-thinking-effort",
        "no effect",
        "what they tune is refused in a request (thinking budgets, speculation) or of other models",
    ),
    Group(
        "--structured-outputs-config",
        "works",
        "with a reasoning parser a request may bring a grammar only if `enable_in_reasoning` is "
        "true",
    ),
    Group("--collect-detailed-traces", "no effect", "no runner of vLLM V1 reads it"),
    Group(
        "--enable-auto-tool-choice --tool-call-parser --tool-parser-plugin --tool-strict-level "
        "--tool-server --exclude-tools-when-tool-choice-none",
        "works",
        "on what the model writes of its own accord (`tool_choice` auto), and on "
        "[grammars](serving.md#structured-output) (required, or by name)",
    ),
    Group("--reasoning-parser --reasoning-parser-plugin", "works", "on the text of an answer"),
    Group(
        "--otlp-traces-endpoint",
        "works",
        "a request's span also says [what its denoising took](deploy.md#traces)",
    ),
    Group(
        "--enable-per-request-metrics --kv-cache-metrics --kv-cache-metrics-sample",
        "works",
        "what the numbers mean: [serving](serving.md#vllms-own-figures)",
    ),
    Group(
        "--enable-sleep-mode --sleep-preserve-parameter-names "
        "--sleep-mode-backend --enable-cumem-allocator --enable-nccl-comm-suspend",
        "works",
        "on a GPU; a request to an engine that sleeps waits until it is woken, as in stock",
    ),
    Group("--sleep-mode-offload-cudagraph", "no effect", "graphs stay on the device"),
    Group("--enable-scale-out --tokens-only", "works", "but they still lower `max_tokens`"),
    Group(
        "--quantization --quantization-config --allow-deprecated-quantization",
        "works",
        "vLLM's linear layers do it; quantised checkpoints need no flag "
        "([which were tested](models.md#quantised-weights))",
    ),
    Group(
        "--grpc --grpc-port --enable-fault-tolerance --fault-tolerance-config "
        "--weight-transfer-config --model-class-overrides --watchdog-config",
        "works",
        "no part of it is ours; not tested here",
    ),
    Group(
        "model_tag --help --config --headless --api-server-count --disable-log-stats "
        "--aggregate-engine-logging --fail-on-environ-validation --shutdown-timeout "
        "--enable-log-requests",
        "works",
    ),
    Group(
        "--host --port --uds --uvicorn-log-level --disable-uvicorn-access-log "
        "--disable-access-log-for-endpoints --allow-credentials --allowed-origins "
        "--allowed-methods --allowed-headers --api-key --ssl-keyfile --ssl-certfile --ssl-ca-certs "
        "--enable-ssl-refresh --ssl-cert-reqs --ssl-ciphers --root-path --middleware "
        "--enable-request-id-headers --disable-fastapi-docs --h11-max-incomplete-event-size "
        "--h11-max-header-count --enable-offline-docs --sse-keep-alive-interval "
        "--enable-server-load-tracking --enable-tokenizer-info-endpoint --log-error-stack "
        "--fingerprint-mode --fingerprint-value --data-parallel-supervisor-port "
        "--dp-supervisor-probe-interval-s --dp-supervisor-probe-timeout-s "
        "--dp-supervisor-probe-failure-threshold",
        "works",
    ),
    Group(
        "--chat-template --chat-template-content-format --trust-request-chat-template "
        "--default-chat-template-kwargs --response-role --return-tokens-as-token-ids --max-log-len "
        "--enable-log-outputs --enable-log-deltas --enable-force-include-usage",
        "works",
    ),
    Group(
        "--model --tokenizer --tokenizer-mode --trust-remote-code --dtype --hf-config-path "
        "--revision --code-revision --tokenizer-revision --max-model-len --max-logprobs "
        "--skip-tokenizer-init --served-model-name --config-format --hf-token --hf-overrides "
        "--renderer-num-workers",
        "works",
    ),
    Group(
        "--load-format --download-dir --safetensors-load-strategy "
        "--safetensors-prefetch-num-threads --safetensors-prefetch-block-size "
        "--model-loader-extra-config --ignore-patterns --use-tqdm-on-load --pt-load-map-location",
        "works",
    ),
    Group(
        "--attention-backend --attention-config",
        "ours",
        "FLASH_ATTN, TRITON_ATTN or CUSTOM, which is [ours, on xformers]"
        "(recipe-gpu.md#attention-by-xformers); FLASHINFER, FLEX_ATTENTION and those that attend "
        "one way only are refused ([why](decisions.md))",
    ),
    Group("--kernel-config --ir-op-priority --linear-backend", "works"),
    Group("--moe-backend", "works", "with LLaDA-MoE; other models have no experts"),
    Group(
        "--distributed-executor-backend --master-addr --master-port --nnodes --node-rank "
        "--distributed-timeout-seconds --cpu-distributed-timeout-seconds --numa-bind "
        "--numa-bind-nodes --numa-bind-cpus --device-ids --enable-shm-tensor-arena "
        "--max-parallel-loading-workers --ray-workers-use-nsight --disable-custom-all-reduce "
        "--worker-extension-cls",
        "works",
    ),
    Group(
        "--data-parallel-size --data-parallel-rank --data-parallel-start-rank "
        "--data-parallel-size-local --data-parallel-address --data-parallel-rpc-port "
        "--data-parallel-backend --data-parallel-hybrid-lb --data-parallel-external-lb "
        "--data-parallel-multi-port-external-lb",
        "works",
    ),
    Group(
        "--gpu-memory-utilization --kv-cache-memory-bytes --num-gpu-blocks-override --watermark",
        "works",
    ),
    Group(
        "--max-num-seqs --max-num-active-seqs --max-num-queued-reqs --max-num-queued-tokens "
        "--scheduling-policy --stream-interval",
        "works",
    ),
    Group(
        "--logging-config --log-level --log-config-file --show-hidden-metrics-for-version "
        "--custom-histogram-buckets --profiler-config",
        "works",
    ),
)

ONLY_IN: dict[str, str] = {
    "--monokernel": "0.33",
    "--reasoning-effort-map": "0.33",
    "--sleep-mode-backend": "0.33",
    "--watchdog-config": "0.33",
}
"""Flags that not every supported release of vLLM has, and the first one that does."""


def all_flags() -> list[str]:
    """Every flag that is decided on; once, if the tables are right."""
    refused = [name for flag, rule in REFUSED.items() for name in (flag, *rule.also)]
    return refused + [name for group in GROUPS for name in group.flags.split()]


def refuse_flags(vllm_config: Any) -> None:
    """End the start where a refused flag is set.

    Raises:
        ValueError: names the flags that set it, why, and what to do.
    """
    for flag, rule in REFUSED.items():
        value = reduce(lambda at, name: getattr(at, name, None), rule.field.split("."), vllm_config)
        if value is not None and value not in rule.fine:
            flags = ", ".join((flag, *rule.also))
            raise ValueError(f"{flags}: {rule.reason} (vllm_elastic).")


def without_effect() -> dict[str, str]:
    """Flags that have no effect here, by the name each has on a parsed command line."""
    return {
        flag.removeprefix("--").replace("-", "_"): flag
        for group in GROUPS
        if group.status == "no effect"
        for flag in group.flags.split()
    }


_PAGE = """\
# Flags

Every flag of `vllm serve` with a masked diffusion model; keywords of `LLM` are the same with
underscores. A test holds this page against the installed vLLM; it is written by
`python -m vllm_elastic.engine.flag_rules`. What a request may send:
[sampling parameters](sampling-parameters.md).

## Refused at start, with a line that names the flag

| flag | why, and what instead |
|---|---|
{refused}

## With a meaning of its own

{ours}

## Without effect

{no_effect}

## As in stock vLLM

{works}
"""


def page() -> str:
    """The rules as a Markdown page."""
    refused = "\n".join(
        f"| {_names((flag, *rule.also))} | {rule.reason} |" for flag, rule in REFUSED.items()
    )
    tables = {
        status.replace(" ", "_"): "\n".join(
            ["| flags | |", "|---|---|"]
            + [
                f"| {_names(group.flags.split())} | {group.note} |"
                for group in GROUPS
                if group.status == status
            ]
        )
        for status in ("ours", "no effect", "works")
    }
    return _PAGE.format(refused=refused, **tables)


def _names(flags: Any) -> str:
    return ", ".join(f"`{flag}`" for flag in flags)


if __name__ == "__main__":
    print(page(), end="")
