# SPDX-License-Identifier: Apache-2.0
"""Every name of vLLM that vllm_elastic touches, checked against the installed vLLM.

Most of them are private to vLLM and may change with any release. An upgrade fails here first, with
a message that says which file relies on what.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest
import vllm

PACKAGE = Path(__file__).parent.parent / "vllm_elastic"
VERSION = f"vLLM {vllm.__version__}"
RELEASE = ".".join(vllm.__version__.split(".")[:2])

# Where vLLM is known at all. A new file here is a decision, not an accident.
FILES_THAT_IMPORT_VLLM = {
    "attention/xformers_backend.py",
    "patches/admission.py",
    "bench/engine.py",
    "bench/served_model.py",
    "patches/cli_flags.py",
    "patches/ray_on_cpu/communicator.py",
    "patches/ray_on_cpu/platform.py",
    "engine/engine_config.py",
    "engine/grammar.py",
    "engine/image_connector.py",
    "engine/image_renderer.py",
    "engine/request_defaults.py",
    "models/hidden_states.py",
    "models/image_encoder.py",
    "models/image_processor.py",
    "models/llada_v.py",
    "models/ranks.py",
    "runner/images.py",
    "runner/quantised_products.py",
    "runner/in_flight.py",
    "runner/limits.py",
    "runner/runner.py",
    "engine/worker.py",
    "patches/ended_requests.py",
    "patches/reports.py",
    "models/config_parser.py",
    "models/experts.py",
    "models/layer_pass.py",
    "models/layers.py",
    "models/llada.py",
    "models/llada_moe.py",
    "models/llama_like.py",
    "models/transformer.py",
    "runner/adapters.py",
    "runner/batch.py",
    "runner/cache_view.py",
    "runner/cuda_graphs.py",
    "runner/graphed_pass.py",
    "plugin.py",
    "patches/ray_on_cpu/__init__.py",
    "patches/max_tokens.py",
    "patches/sent_parameters.py",
    "patches/watched_requests.py",
    "patches/traced_requests.py",
    "engine/sampling.py",
    "engine/optimisations.py",
    "engine/reporting.py",
    "engine/scheduler.py",
}

SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
WORKERS = ("vllm.v1.worker.cpu_worker:CPUWorker", "vllm.v1.worker.gpu_worker:Worker")
ATTENTION_LAYER = "vllm.model_executor.layers.attention_layer_base:AttentionLayerBase"
CONFIG_PARSER = "vllm.transformers_utils.config:HFConfigParser"
CONFIG_HOOK = "vllm.model_executor.models.config:VerifyAndUpdateConfig"
KV_MANAGER = "vllm.v1.core.kv_cache_manager:KVCacheManager"
CPU_ATTENTION = "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl"
ATTN_UTILS = "vllm.v1.worker.gpu.attn_utils"
CPU_PLATFORM = "vllm.platforms.cpu:CpuPlatform"
EXPERTS = "vllm.model_executor.layers.fused_moe"
LINEAR = "vllm.model_executor.layers.linear"
VOCABULARY = "vllm.model_executor.layers.vocab_parallel_embedding"
OPENAI = "vllm.entrypoints.openai"
COMPLETIONS = f"{OPENAI}.completion.serving:OpenAIServingCompletion"
BEAM_SEARCH = "vllm.entrypoints.generate.beam_search"
QUANTIZATION = "vllm.model_executor.layers.quantization.base_config:QuantizationConfig"
PROCESSING = "vllm.multimodal.processing:"
PROCESSOR = f"{PROCESSING}BaseMultiModalProcessor"
SUPPORTS_IMAGES = "vllm.model_executor.models.interfaces:SupportsMultiModal"
RENDERER = "vllm.renderers.hf:HfRenderer"
ADAPTERS = "vllm.lora.model_manager:LRUCacheLoRAModelManager"
ADAPTERS_OF_WORKER = "vllm.lora.worker_manager:LRUCacheWorkerLoRAManager"
GRAMMAR = "vllm.v1.structured_output.backend_types:StructuredOutputGrammar"
QUANTIZED = ["bias", "quant_config", "prefix"]

# Our class and method -> the vLLM class whose method it overrides.
OVERRIDDEN = [
    ("engine.scheduler:ElasticScheduler.schedule", SCHEDULER),
    ("engine.scheduler:ElasticScheduler.update_from_output", SCHEDULER),
    ("engine.scheduler:ElasticScheduler._preempt_request", SCHEDULER),
    ("engine.scheduler:ElasticScheduler._free_request", SCHEDULER),
    *(("engine.worker:ElasticWorker.init_device", worker) for worker in WORKERS),
    *(("engine.worker:ElasticWorker.compile_or_warm_up_model", worker) for worker in WORKERS),
    (
        "models.hidden_states:_StoreOnly.supports_batch_invariance",
        "vllm.v1.attention.backend:AttentionBackend",
    ),
    ("models.hidden_states:HiddenStateCache.get_attn_backend", ATTENTION_LAYER),
    ("models.hidden_states:HiddenStateCache.get_kv_cache_spec", ATTENTION_LAYER),
    ("engine.engine_config:DiffusionEngineConfig.verify_and_update_config", CONFIG_HOOK),
    ("engine.image_renderer:ImageRenderer.__init__", RENDERER),
    ("engine.image_renderer:ImageRenderer._tokenize_prompt", RENDERER),
    ("engine.image_renderer:ImageRenderer.get_eos_token_id", RENDERER),
    ("models.image_processor:ImageInfo.get_supported_mm_limits", f"{PROCESSING}BaseProcessingInfo"),
    (
        "models.image_processor:ImageInfo.get_mm_max_tokens_per_item",
        f"{PROCESSING}BaseProcessingInfo",
    ),
    (
        "models.image_processor:DummyImages.get_dummy_text",
        f"{PROCESSING}BaseDummyInputsBuilder",
    ),
    (
        "models.image_processor:DummyImages.get_dummy_mm_data",
        f"{PROCESSING}BaseDummyInputsBuilder",
    ),
    *(
        (f"models.image_processor:ImageProcessor.{name}", PROCESSOR)
        for name in (
            "apply",
            "_call_hf_processor",
            "_get_mm_fields_config",
            "_get_prompt_updates",
        )
    ),
    ("models.llada_v:LlavaLLaDAModelLM.get_placeholder_str", SUPPORTS_IMAGES),
    ("runner.adapters:_Manager._init_punica_wrapper", ADAPTERS),
    ("runner.adapters:_Manager._add_adapter", ADAPTERS),
    ("runner.adapters:_Manager._create_lora_modules", ADAPTERS),
    ("runner.adapters:_Manager.activate_adapter", ADAPTERS),
    ("models.config_parser:ConfigByArchitecture.parse", CONFIG_PARSER),
    ("patches.ray_on_cpu.platform:RayCpuPlatform.get_device_communicator_cls", CPU_PLATFORM),
    (
        "patches.ray_on_cpu.communicator:NodeAwareCpuCommunicator._all_group_ranks_share_shm_group_name",
        "vllm.distributed.device_communicators.cpu_communicator:CpuCommunicator",
    ),
]

# Methods of vLLM's that ours overrides and calls with whatever it was given.
PASSED_ON = [("engine.scheduler:ElasticScheduler.make_stats", SCHEDULER)]

# What we call -> names of the arguments given by position, names of those given by keyword.
CALLED: list[tuple[str, list[str], list[str]]] = [
    (f"{SCHEDULER}._update_after_schedule", ["self", "scheduler_output"], []),
    (
        f"{SCHEDULER}.update_from_output",
        ["self", "scheduler_output", "model_runner_output"],
        [],
    ),
    (f"{SCHEDULER}._preempt_request", ["self", "request", "timestamp", "drop_stale_output"], []),
    (f"{SCHEDULER}._free_request", ["self", "request", "delay_free_blocks"], []),
    (f"{KV_MANAGER}.new_step_starts", ["self"], []),
    (f"{KV_MANAGER}.take_new_block_ids", ["self"], []),
    (f"{KV_MANAGER}.get_block_ids", ["self", "request_id"], []),
    (
        f"{KV_MANAGER}.allocate_slots",
        ["self", "request", "num_new_tokens"],
        ["num_lookahead_tokens", "has_scheduled_reqs"],
    ),
    ("vllm.v1.core.sched.request_queue:RequestQueue.peek_request", ["self"], []),
    ("vllm.v1.core.sched.request_queue:RequestQueue.pop_request", ["self"], []),
    ("vllm.v1.core.sched.request_queue:RequestQueue.prepend_request", ["self", "request"], []),
    (f"{GRAMMAR}.fill_bitmask", ["self", "bitmask", "batch_index"], []),
    (f"{GRAMMAR}.is_terminated", ["self"], []),
    (ADAPTERS_OF_WORKER, ["vllm_config", "device", "embedding_modules"], []),
    (f"{ADAPTERS_OF_WORKER}.create_lora_manager", ["self", "model", "vllm_config"], []),
    (f"{ADAPTERS_OF_WORKER}.add_adapter", ["self", "lora_request"], []),
    (f"{ADAPTERS_OF_WORKER}.remove_adapter", ["self", "adapter_id"], []),
    (f"{ADAPTERS_OF_WORKER}.pin_adapter", ["self", "adapter_id"], []),
    (f"{ADAPTERS_OF_WORKER}.list_adapters", ["self"], []),
    (f"{ADAPTERS_OF_WORKER}.remove_all_adapters", ["self"], []),
    (f"{GRAMMAR}.validate_tokens", ["self", "tokens"], []),
    ("vllm.sampling_params:StructuredOutputsParams.all_constraints_none", ["self"], []),
    ("vllm.v1.request:Request.record_event", ["self", "event_type", "timestamp"], []),
    (
        "vllm.v1.metrics.stats:PrefillStats.set",
        ["self"],
        ["num_prompt_tokens", "num_local_cached_tokens", "num_external_cached_tokens"],
    ),
    ("vllm.v1.core.sched.output:CachedRequestData.make_empty", [], []),
    ("vllm.v1.core.sched.output:NewRequestData.from_request", ["request", "block_ids"], []),
    ("vllm.multimodal.inputs:MultiModalKwargsItem.get_data", ["self"], []),
    ("vllm.multimodal.inputs:MultiModalFieldConfig.batched", ["modality"], []),
    ("vllm.multimodal.parse:ImageProcessorItems.get_image_size", ["self", "item_idx"], []),
    ("vllm.multimodal.parse:ImageEmbeddingItems.get_feature_size", ["self", "item_idx"], []),
    (f"{PROCESSING}PromptReplacement", ["modality", "target", "replacement"], []),
    (
        "vllm.model_executor.models.siglip:SiglipVisionModel",
        ["config", "quant_config"],
        ["num_hidden_layers_override", "require_post_norm", "prefix"],
    ),
    (
        "vllm.model_executor.models.utils:AutoWeightsLoader.load_weights",
        ["self", "weights"],
        [],
    ),
    ("vllm.model_executor.models.utils:WeightsMapper.map_name", ["self", "key"], []),
    ("vllm.model_executor.models.utils:WeightsMapper.__or__", ["self", "other"], []),
    (f"{QUANTIZATION}.get_checkpoint_weight_mapper", [], []),
    (f"{QUANTIZATION}.apply_vllm_mapper", ["self", "hf_to_vllm_mapper"], []),
    (
        "vllm.renderers.registry:RendererRegistry.register",
        ["self", "renderer_mode", "module", "class_name"],
        [],
    ),
    (
        "vllm.tokenizers.registry:_TokenizerRegistry.register",
        ["self", "tokenizer_mode", "module", "class_name"],
        [],
    ),
    (
        "vllm.multimodal.media:MediaConnector.load_from_url",
        ["self", "url", "media_io"],
        ["fetch_timeout"],
    ),
    (
        "vllm.multimodal.media:MediaConnector.load_from_url_async",
        ["self", "url", "media_io"],
        ["fetch_timeout"],
    ),
    (
        "vllm.v1.core.sched.output:SchedulerOutput",
        [],
        [
            "scheduled_new_reqs",
            "scheduled_cached_reqs",
            "num_scheduled_tokens",
            "total_num_scheduled_tokens",
            "scheduled_spec_decode_tokens",
            "scheduled_encoder_inputs",
            "finished_req_ids",
            "free_encoder_mm_hashes",
            "preempted_req_ids",
        ],
    ),
    (
        "vllm.v1.outputs:ModelRunnerOutput",
        [],
        ["req_ids", "req_id_to_index", "sampled_token_ids"],
    ),
    ("vllm.utils.gc_utils:freeze_gc_for_cudagraph_capture", [], []),
    ("vllm.utils.gc_utils:freeze_gc_heap", [], []),
    ("vllm.v1.worker.workspace:lock_workspace", [], []),
    ("vllm.sampling_params:SamplingParams._verify_args", ["self"], []),
    ("vllm.v1.worker.worker_base:CompilationTimes", [], ["language_model", "encoder"]),
    ("vllm.model_executor.model_loader:get_model", [], ["vllm_config"]),
    (
        "vllm.model_executor.model_loader.reload.inplace:reload_weights",
        ["vllm_config", "model", "weights_iterator", "weights_path", "is_checkpoint_format"],
        [],
    ),
    ("vllm.model_executor.model_loader.reload.layerwise:finalize_layerwise_reload", [], []),
    ("vllm.config:set_current_vllm_config", ["vllm_config"], []),
    (f"{ATTN_UTILS}:get_kv_cache_spec", ["vllm_config"], []),
    (f"{ATTN_UTILS}:init_attn_backend", ["kv_cache_config", "vllm_config", "device"], []),
    (
        f"{ATTN_UTILS}:init_kv_cache",
        [
            "forward_context",
            "kv_cache_config",
            "device",
            "kernel_block_sizes",
            "vllm_config",
            "kv_cache_allocation_context",
        ],
        [],
    ),
    ("vllm.v1.worker.utils:AttentionGroup.get_metadata_builder", ["self"], []),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder.build",
        ["self"],
        ["common_prefix_len", "common_attn_metadata", "fast_build"],
    ),
    ("vllm.config:CUDAGraphMode.has_full_cudagraphs", ["self"], []),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support",
        ["vllm_config", "kv_cache_spec"],
        [],
    ),
    (
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        [],
        [
            "query_start_loc",
            "query_start_loc_cpu",
            "seq_lens",
            "seq_lens_cpu_upper_bound",
            "num_reqs",
            "num_actual_tokens",
            "max_query_len",
            "max_seq_len",
            "block_table_tensor",
            "slot_mapping",
            "causal",
        ],
    ),
    (
        f"{CPU_ATTENTION}.do_kv_cache_update",
        ["self", "layer", "key", "value", "kv_cache", "slot_mapping"],
        [],
    ),
    (
        f"{CPU_ATTENTION}.forward",
        ["self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"],
        [],
    ),
    (
        "vllm.v1.kv_cache_interface:HiddenStateCacheSpec",
        [],
        ["block_size", "num_kv_heads", "head_size", "dtype"],
    ),
    (
        "vllm.model_executor.layers.attention:Attention",
        ["num_heads", "head_size", "scale"],
        ["num_kv_heads", "cache_config", "quant_config", "prefix"],
    ),
    (
        f"{LINEAR}:QKVParallelLinear",
        ["hidden_size", "head_size", "total_num_heads", "total_num_kv_heads"],
        QUANTIZED,
    ),
    (f"{LINEAR}:RowParallelLinear", ["input_size", "output_size"], QUANTIZED),
    (f"{LINEAR}:MergedColumnParallelLinear", ["input_size", "output_sizes"], QUANTIZED),
    (f"{VOCABULARY}:VocabParallelEmbedding", ["num_embeddings", "embedding_dim"], []),
    (
        f"{VOCABULARY}:ParallelLMHead",
        ["num_embeddings", "embedding_dim"],
        ["quant_config", "prefix"],
    ),
    (f"{VOCABULARY}:ParallelLMHead.tie_weights", ["self", "embed_tokens"], []),
    ("vllm.model_executor.layers.layernorm:RMSNorm", ["hidden_size"], ["eps"]),
    (f"{EXPERTS}:GateLinear", ["input_size", "output_size"], ["prefix"]),
    (
        f"{EXPERTS}:FusedMoEFactory",
        [],
        [
            "num_experts",
            "top_k",
            "hidden_size",
            "intermediate_size",
            "renormalize",
            "quant_config",
            "dp_size",
            "prefix",
        ],
    ),
    (f"{EXPERTS}:MoERunner.forward", ["self", "hidden_states", "router_logits"], []),
    (f"{EXPERTS}:MoERunner.load_weights", ["self", "weights"], []),
    ("vllm.forward_context:set_forward_context", ["attn_metadata", "vllm_config"], []),
    ("vllm.utils.torch_utils:weak_ref_tensors", ["tensors"], []),
    ("vllm.v1.attention.backends.registry:AttentionBackendEnum.get_class", ["self"], []),
    ("vllm.v1.attention.backends.registry:AttentionBackendEnum.is_overridden", ["self"], []),
    ("vllm.v1.attention.backends.registry:register_backend", ["backend", "class_path"], []),
    ("vllm.v1.attention.backend:AttentionBackend.supports_non_causal", [], []),
    ("vllm.v1.attention.backend:AttentionBackend.supported_kv_cache_layouts", [], []),
    (
        "vllm.v1.attention.backend:AttentionMetadataBuilder",
        ["kv_cache_spec", "layer_names", "vllm_config", "device"],
        [],
    ),
    ("vllm.utils.torch_utils:async_tensor_h2d", ["data", "device", "dtype"], []),
    (
        "vllm.model_executor.layers.rotary_embedding:get_rope",
        ["head_size"],
        ["max_position", "rope_parameters", "is_neox_style"],
    ),
    ("vllm.model_executor.layers.logits_processor:LogitsProcessor", ["vocab_size"], []),
    (
        "vllm.model_executor.layers.logits_processor:LogitsProcessor.forward",
        ["self", "lm_head", "hidden_states"],
        [],
    ),
    ("vllm.distributed:tensor_model_parallel_all_gather", ["input_"], ["dim"]),
    ("vllm.distributed:tensor_model_parallel_all_reduce", ["input_"], []),
    ("vllm.distributed.parallel_state:in_the_same_node_as", ["pg"], []),
    ("vllm.platforms:cpu_platform_plugin", [], []),
    (
        "vllm.model_executor.model_loader.weight_utils:default_weight_loader",
        ["param", "loaded_weight"],
        [],
    ),
    ("vllm.model_executor.models.utils:maybe_prefix", ["prefix", "name"], []),
    (
        "vllm.model_executor.models:ModelRegistry.register_model",
        ["model_arch", "model_cls"],
        [],
    ),
    ("vllm.exceptions:VLLMValidationError", ["message"], ["parameter", "value"]),
    ("vllm.v1.engine:EngineCoreOutput", [], ["request_id", "new_token_ids"]),
    ("vllm.v1.engine:EngineCoreOutputs", [], []),
    ("vllm.tokenizers:cached_tokenizer_from_config", ["model_config"], []),
    ("vllm.engine.arg_utils:EngineArgs", [], ["model", "dtype", "skip_tokenizer_init"]),
    ("vllm.engine.arg_utils:EngineArgs.create_model_config", ["self"], []),
    ("vllm.engine.arg_utils:EngineArgs.add_cli_args", ["parser"], []),
    ("vllm.engine.arg_utils:EngineArgs.from_cli_args", ["args"], []),
]

# Methods that we wrap: what our wrapper reads by position -> the rest passes through.
WRAPPED = {
    "vllm.v1.engine.output_processor:OutputProcessor.add_request": ["self", "request"],
    "vllm.v1.engine.output_processor:OutputProcessor.process_outputs": [
        "self",
        "engine_core_outputs",
        "engine_core_timestamp",
        "iteration_stats",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor.update_scheduler_stats": [
        "self",
        "scheduler_stats",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor._update_stats_from_finished": [
        "self",
        "req_state",
        "finish_reason",
        "iteration_stats",
    ],
    "vllm.v1.engine.output_processor:OutputProcessor.do_tracing": [
        "self",
        "engine_core_output",
        "req_state",
    ],
    "vllm.v1.engine.output_processor:RequestState._new_completion_output": [
        "self",
        "token_ids",
        "finish_reason",
        "stop_reason",
    ],
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ["self"],
    **{
        f"{OPENAI}.{request}.to_sampling_params": ["self", lengths, "default_sampling_params"]
        for request, lengths in (
            ("chat_completion.protocol:ChatCompletionRequest", "max_tokens"),
            ("completion.protocol:CompletionRequest", "max_tokens"),
            ("responses.protocol:ResponsesRequest", "default_max_tokens"),
        )
    },
    f"{COMPLETIONS}.create_completion": ["self", "request", "raw_request"],
    f"{OPENAI}.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator": [
        "self",
        "request",
        "result_generator",
        "request_id",
        "model_name",
        "conversation",
        "tokenizer",
    ],
    f"{BEAM_SEARCH}.online:BeamSearchOnlineMixin.beam_search": ["self"],
    f"{BEAM_SEARCH}.offline:BeamSearchOfflineMixin.beam_search": ["self"],
}

# Attributes that we read or set on objects that vLLM hands us.
ATTRIBUTES: dict[str, list[str]] = {
    "vllm.config:AttentionConfig": [
        "backend",
        "flash_attn_max_num_splits_for_cuda_graph",
        "use_non_causal",
    ],
    "vllm.config:VllmConfig": [
        "additional_config",
        "attention_config",
        "cache_config",
        "compilation_config",
        "model_config",
        "optimization_level",
        "parallel_config",
        "quant_config",
        "scheduler_config",
    ],
    "vllm.config:CacheConfig": [
        "block_size",
        "cache_dtype",
        "enable_prefix_caching",
        "user_specified_block_size",
    ],
    "vllm.config:ModelConfig": [
        "dtype",
        "enforce_eager",
        "generation_config",
        "hf_config",
        "max_model_len",
        "model",
        "model_arch_config",
        "override_generation_config",
        "seed",
        "served_model_name",
        "skip_tokenizer_init",
        "tokenizer_mode",
        "try_get_generation_config",
    ],
    "vllm.config:SchedulerConfig": [
        "async_scheduling",
        "enable_chunked_prefill",
        "max_num_batched_tokens",
        "scheduler_cls",
    ],
    "vllm.config.model_arch:ModelArchitectureConfig": ["num_experts"],
    "vllm.config:ParallelConfig": [
        "data_parallel_external_lb",
        "data_parallel_index",
        "data_parallel_size",
        "tensor_parallel_size",
        "worker_cls",
    ],
    "vllm.config:CompilationConfig": [
        "cudagraph_capture_sizes",
        "cudagraph_mode",
        "max_cudagraph_capture_size",
        "static_forward_context",
    ],
    "vllm.config:CompilationMode": ["NONE"],
    "vllm.config:CUDAGraphMode": ["NONE"],
    "vllm.v1.attention.backend:AttentionCGSupport": ["UNIFORM_BATCH"],
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadata": ["max_num_splits"],
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder": [
        "aot_schedule",
        "vllm_config",
    ],
    "vllm.engine.arg_utils:EngineArgs": ["additional_config"],
    "vllm.model_executor.layers.attention:Attention": [
        "head_size",
        "impl",
        "kv_cache",
        "layer_name",
        "num_heads",
        "num_kv_heads",
    ],
    "vllm.model_executor.models.registry:_ModelRegistry": ["models"],
    "vllm.platforms.cpu:CpuPlatform": ["ray_device_key"],
    f"{OPENAI}.chat_completion.protocol:ChatCompletionRequest": [
        "echo",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "prompt_logprobs",
        "response_format",
        "tool_choice",
        "vllm_xargs",
    ],
    f"{OPENAI}.completion.protocol:CompletionRequest": [
        "echo",
        "logprobs",
        "max_tokens",
        "prompt_logprobs",
        "response_format",
    ],
    f"{OPENAI}.responses.protocol:ResponsesRequest": ["max_output_tokens", "text", "tool_choice"],
    COMPLETIONS: ["default_sampling_params", "engine_client"],
    f"{BEAM_SEARCH}.online:BeamSearchOnlineMixin": ["engine_client"],
    f"{BEAM_SEARCH}.offline:BeamSearchOfflineMixin": ["llm_engine"],
    "vllm.engine.protocol:EngineClient": ["vllm_config"],
    "vllm.v1.engine.llm_engine:LLMEngine": ["vllm_config"],
    "vllm.outputs:CompletionOutput": ["cumulative_logprob", "logprobs", "token_ids"],
    "vllm.sampling_params:SamplingParams": [
        "all_stop_token_ids",
        "eos_token_id",
        "extra_args",
        "ignore_eos",
        "max_tokens",
        "prompt_logprobs",
        "stop_token_ids",
        "structured_outputs",
    ],
    "vllm.config:StructuredOutputsConfig": ["enable_in_reasoning", "reasoning_parser"],
    "vllm.v1.structured_output.request:StructuredOutputRequest": ["grammar"],
    "vllm.v1.core.sched.interface:PauseState": ["PAUSED_ALL", "UNPAUSED"],
    "vllm.v1.core.sched.output:SchedulerOutput": ["num_scheduled_tokens", "scheduled_new_reqs"],
    "vllm.v1.core.sched.output:NewRequestData": ["block_ids", "mm_features"],
    "vllm.multimodal.inputs:MultiModalFeatureSpec": ["data", "mm_position"],
    "vllm.multimodal.inputs:PlaceholderRange": ["length", "offset"],
    f"{PROCESSING}ProcessorInputs": ["hf_processor_mm_kwargs", "mm_data_items", "prompt"],
    "vllm.v1.engine:EngineCoreEventType": ["SCHEDULED"],
    "vllm.v1.engine:EngineCoreOutput": [
        "finish_reason",
        "kv_transfer_params",
        "new_token_ids",
        "request_id",
    ],
    "vllm.v1.engine:EngineCoreOutputs": ["outputs"],
    "vllm.v1.engine.detokenizer:BaseIncrementalDetokenizer": ["include_stop_str_in_output"],
    "vllm.v1.engine.detokenizer:IncrementalDetokenizer": ["num_output_tokens"],
    "vllm.v1.engine.output_processor:OutputProcessor": ["request_states"],
    "vllm.v1.engine.output_processor:RequestState": [
        "detokenizer",
        "request_index",
        "stats",
    ],
    "vllm.v1.metrics.stats:IterationStats": ["num_generation_tokens"],
    "vllm.v1.metrics.stats:RequestStateStats": ["num_generation_tokens"],
    "vllm.v1.engine:EngineCoreRequest": ["mm_features", "prompt_token_ids", "sampling_params"],
    "vllm.v1.engine.input_processor:InputProcessor": ["process_inputs", "vllm_config"],
    "vllm.v1.kv_cache_interface:KVCacheConfig": ["kv_cache_groups", "num_blocks"],
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ["kv_cache_spec"],
    "vllm.v1.kv_cache_interface:KVCacheSpec": ["block_size", "page_size_bytes"],
    "vllm.v1.outputs:ModelRunnerOutput": ["req_ids", "sampled_token_ids"],
    "vllm.v1.request:Request": [
        "client_index",
        "max_tokens",
        "mm_features",
        "num_computed_tokens",
        "num_output_tokens",
        "num_prompt_tokens",
        "num_tokens",
        "output_token_ids",
        "prefill_stats",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "status",
        "stop_reason",
        "structured_output_request",
    ],
    "vllm.v1.request:RequestStatus": [
        "FINISHED_STOPPED",
        "PREEMPTED",
        "RUNNING",
    ],
    "vllm.v1.worker.utils:AttentionGroup": ["backend", "kv_cache_spec", "layer_names"],
}

# Containers of vLLM's that we fill or iterate over: a release may give one another type.
CONTAINERS: dict[str, dict[str, str]] = {
    "vllm.lora.model_manager:LoRAModelManager": {
        "lora_index_to_id": "list[int | None]",
        "modules": "dict[str, BaseLayerWithLoRA]",
        "packed_modules": "dict[str, list[str]]",
        "punica_wrapper_mapping": "dict[str, PunicaWrapperBase]",
    },
    "vllm.lora.lora_model:LoRAModel": {"loras": "dict[str, LoRALayerWeights]"},
    SCHEDULER: {
        "deferred_waiting": "set[Request]",
        "encoder_cache_mismatch_reqs": "set[str]",
        "requests": "dict[str, Request]",
        "running": "list[Request]",
    },
    "vllm.config:ModelConfig": {"override_generation_config": "dict[str, Any]"},
    "vllm.v1.core.sched.output:SchedulerOutput": {"num_scheduled_tokens": "dict[str, int]"},
    "vllm.v1.engine:EngineCoreOutput": {"kv_transfer_params": "dict[str, Any] | None"},
    "vllm.v1.engine:EngineCoreOutputs": {"outputs": "list[EngineCoreOutput]"},
    "vllm.v1.metrics.stats:SchedulerStats": {"kv_connector_stats": "dict[str, Any] | None"},
    "vllm.v1.outputs:ModelRunnerOutput": {
        "req_ids": "list[str]",
        "sampled_token_ids": "list[list[int]]",
        "logprobs": "LogprobsLists | None",
    },
    "vllm.v1.outputs:LogprobsLists": {
        "logprob_token_ids": "np.ndarray",
        "logprobs": "np.ndarray",
        "sampled_token_ranks": "np.ndarray",
        "cu_num_generated_tokens": "list[int] | None",
    },
}

# Our subclasses: whatever they read of `self` and do not define has to come from vLLM.
SUBCLASSES = {
    "engine.scheduler:ElasticScheduler": (SCHEDULER,),
    "engine.worker:ElasticWorker": WORKERS,
    "engine.image_renderer:ImageRenderer": (RENDERER,),
    "models.image_processor:ImageProcessor": (PROCESSOR,),
    "models.image_processor:ImageInfo": (f"{PROCESSING}BaseProcessingInfo",),
}

# What vLLM's workers ask of their runner, and ours does not offer because nobody gets there.
NOT_ASKED_OF_OUR_RUNNER = {
    # pooling models
    "_dummy_pooler_run": "pooling",
    "pool": "Model Runner V2",
    # warm-up and CUDA graphs: ElasticWorker.compile_or_warm_up_model replaces it all
    "eplb": "warm-up",
    "_dummy_run": "warm-up; data parallel dummy batches",
    "_dummy_sampler_run": "warm-up",
    "capture_model": "warm-up",
    "maybe_remove_all_loras": "warm-up",
    "lora_config": "warm-up",
    "needs_cudagraph_capture": "Model Runner V2",
    "profile_cudagraph_memory": "CUDA graphs are off with enforce_eager",
    # development and RL endpoints
    "get_encoder_timing_stats": "multimodal models",
    # asked with hasattr
    "_init_kv_zero_meta": "asked with hasattr",
    "release_late_interaction_query_cache": "asked with getattr and a default",
    "uniform_decode_query_len": "asked with getattr and a default",
}

# Of these, the names that not every release has.
ASKED_SINCE = {"eplb": "0.33"}


def resolve(path: str) -> Any:
    """``package.module:Qualified.name`` as an object; the class attribute itself, unbound."""
    module, _, names = path.partition(":")
    found = importlib.import_module(module)
    for name in filter(None, names.split(".")):
        assert hasattr(found, name), f"{VERSION} has no {name!r} in {found!r} ({path})"
        found = getattr(found, name)
    return found


def original(function: Any) -> Any:
    """vLLM's own function, where a test before this one loaded the plugin, which wraps it."""
    plain = inspect.unwrap(getattr(function, "__func__", function))
    if not inspect.isfunction(plain) or not plain.__module__.startswith("vllm_elastic"):
        return function
    kept = [cell.cell_contents for cell in plain.__closure__ or ()]
    (wrapped,) = [content for content in kept if callable(content)]
    owner = getattr(function, "__self__", None)
    return wrapped if owner is None else types.MethodType(wrapped, owner)


def own(path: str) -> Any:
    return resolve(f"vllm_elastic.{path}")


def source_tree(cls: type) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(cls)))


def annotations_of(cls: type) -> dict[str, str]:
    """Types that a class's own source gives its fields, and its methods ``self``'s attributes."""
    found = {}
    for node in ast.walk(source_tree(cls)):
        if isinstance(node, ast.AnnAssign):
            target = node.target
            name = target.attr if isinstance(target, ast.Attribute) else ast.unparse(target)
            found[name] = ast.unparse(node.annotation)
    return found


@functools.cache
def attributes_of(cls: type) -> frozenset[str]:
    """Names that a class or its vLLM bases have: in the class, annotated, or set in a method."""
    names = set(dir(cls))
    for base in cls.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if base.__module__.startswith("vllm."):
            names |= {
                attribute for attribute, ctx in self_names(base) if isinstance(ctx, ast.Store)
            }
    return frozenset(names)


def self_names(cls: type) -> list[tuple[str, ast.expr_context]]:
    """Every ``self.name`` in a class's source, and whether it is read or set."""
    return [
        (node.attr, node.ctx)
        for node in ast.walk(source_tree(cls))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    ]


def names_set_by(cls: type) -> set[str]:
    """Every ``name`` that a class's methods assign as ``self.name = ...``."""
    return {name for name, ctx in self_names(cls) if isinstance(ctx, ast.Store)}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """(name, kind, default) of every parameter; ``self`` too where there is one."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def imports() -> list[Any]:
    """(file, module, name) of every ``from vllm... import name`` and ``import vllm...``."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        file = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[tuple[str, str | None]] = []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [(node.module, alias.name) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [(alias.name, None) for alias in node.names]
            found += [
                pytest.param(file, module, name, id=f"{file}-{module}-{name}")
                for module, name in names
                if re.match(r"vllm(\.|$)", module)
            ]
    return found


@pytest.mark.parametrize(("file", "module", "name"), imports())
def test_imported_name_exists(file: str, module: str, name: str | None) -> None:
    """vLLM moved or renamed something that we import."""
    where = f"vllm_elastic/{file} imports {name} from {module}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        pytest.fail(f"{where}, but {VERSION} cannot import {module}: {error}")
    if name is not None and not hasattr(found, name):
        try:
            importlib.import_module(f"{module}.{name}")
        except ImportError:
            pytest.fail(f"{where}, but {VERSION} has no {name} there")


def test_files_that_import_vllm() -> None:
    """vLLM's names would spread over the project, and upgrades would touch everything."""
    found = {param.values[0] for param in imports()}
    assert found - FILES_THAT_IMPORT_VLLM == set(), "new files import vLLM"
    assert FILES_THAT_IMPORT_VLLM - found == set(), "no longer import vLLM: shorten the list"


@pytest.mark.parametrize(("ours", "base"), OVERRIDDEN)
def test_overridden_method_has_vllms_parameters(ours: str, base: str) -> None:
    """vLLM would call our method with arguments that it does not take, or not call it at all."""
    method = ours.split(".")[-1]
    theirs = resolve(f"{base}.{method}")
    mine = own(ours)
    assert mine is not theirs, f"vllm_elastic.{ours} overrides nothing"
    assert parameters(mine) == parameters(theirs), (
        f"vllm_elastic.{ours}{inspect.signature(mine)} overrides {base}.{method}"
        f"{inspect.signature(theirs)} of {VERSION}"
    )


def test_nothing_that_vllm_demands_is_missing() -> None:
    """A release that asks for one more method would fail in the first pass."""
    from vllm_elastic.runner.in_flight import PassInFlight

    assert not PassInFlight.__abstractmethods__


@pytest.mark.parametrize(("ours", "base"), PASSED_ON)
def test_overriding_method_passes_everything_on(ours: str, base: str) -> None:
    """One that names arguments has to name vLLM's: it belongs to the list above."""
    resolve(f"{base}.{ours.split('.')[-1]}")
    kinds = [kind for name, kind, _ in parameters(own(ours)) if name != "self"]
    assert kinds == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]


@pytest.mark.parametrize(
    ("path", "positional", "keywords"), CALLED, ids=[path for path, _, _ in CALLED]
)
def test_called_name_takes_our_arguments(
    path: str, positional: list[str], keywords: list[str]
) -> None:
    """vLLM reordered, renamed or added an argument of something that we call."""
    signature = inspect.signature(original(resolve(path)))
    names = list(signature.parameters)
    assert names[: len(positional)] == positional, f"{VERSION}: {path}{signature}"
    try:
        signature.bind(*positional, **dict.fromkeys(keywords))
    except TypeError as error:
        pytest.fail(f"{VERSION}: {path}{signature}: {error}")


@pytest.mark.parametrize("path", ATTRIBUTES)
def test_attributes_exist(path: str) -> None:
    """vLLM renamed an attribute that we read; one that we *set* would go unnoticed."""
    missing = set(ATTRIBUTES[path]) - attributes_of(resolve(path))
    assert not missing, f"{VERSION}: {path} has no {sorted(missing)}"


@pytest.mark.parametrize("path", CONTAINERS)
def test_containers_are_of_the_known_type(path: str) -> None:
    """A release gave a name another type: `update` of a set is a ValueError of a dict."""
    types = annotations_of(resolve(path))
    found = {name: types.get(name) for name in CONTAINERS[path]}
    assert found == CONTAINERS[path], f"{VERSION}: {path}"


def test_refused_sampling_parameters_exist() -> None:
    """A parameter that vLLM renamed would be ignored instead of refused."""
    known = attributes_of(resolve("vllm.sampling_params:SamplingParams"))
    missing = {name for name in own("engine.sampling_rules:RULES")} - known
    assert not missing, f"{VERSION}: SamplingParams has no {sorted(missing)}"


@pytest.mark.parametrize("ours", SUBCLASSES)
def test_inherited_attributes_exist(ours: str) -> None:
    """A subclass of ours reads an attribute that vLLM's class no longer has."""
    cls = own(ours)
    used = {name for name, ctx in self_names(cls) if isinstance(ctx, ast.Load)}
    mine = set(vars(cls)) | names_set_by(cls)
    for base in SUBCLASSES[ours]:
        missing = used - mine - attributes_of(resolve(base))
        assert not missing, f"vllm_elastic.{ours} uses {sorted(missing)}, not in {base}, {VERSION}"


def test_our_names_do_not_hide_vllms() -> None:
    """A new private attribute of vLLM's scheduler could have the name of one of ours."""
    cls, base = own("engine.scheduler:ElasticScheduler"), resolve(SCHEDULER)
    overridden = {ours.split(".")[-1] for ours, _ in OVERRIDDEN + PASSED_ON}
    mine = {name for name in vars(cls) if not name.startswith(("__", "_abc_"))}
    mine |= names_set_by(cls)
    # Counted up in place, as vLLM's own schedule() does.
    shared = {"current_step"}
    hidden = (mine - overridden - shared) & attributes_of(base)
    assert not hidden, f"{VERSION}: Scheduler has {sorted(hidden)} too"


def runner_names() -> dict[str, list[str]]:
    """What the workers' sources ask of ``model_runner``: name -> files."""
    names: dict[str, list[str]] = {}
    for module in ("cpu_worker", "gpu_worker", "worker_base"):
        source = inspect.getsource(importlib.import_module(f"vllm.v1.worker.{module}"))
        for node in ast.walk(ast.parse(source)):
            name = None
            if isinstance(node, ast.Attribute) and _is_runner(node.value):
                name = node.attr
            elif (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in ("getattr", "hasattr")
                and _is_runner(node.args[0])
                and isinstance(node.args[1], ast.Constant)
            ):
                name = str(node.args[1].value)
            if name is not None:
                names.setdefault(name, []).append(module)
    return names


def _is_runner(node: ast.expr) -> bool:
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return name == "model_runner"


@pytest.mark.parametrize("name", sorted(runner_names()))
def test_runner_offers_what_the_workers_ask(name: str) -> None:
    """vLLM's worker asks our runner for something that it does not have."""
    runner = own("runner.runner:ElasticRunner")
    offered = set(dir(runner)) | names_set_by(runner)
    assert (name in offered) != (name in NOT_ASKED_OF_OUR_RUNNER), (
        f"{VERSION}: {', '.join(runner_names()[name])} asks model_runner.{name}: offer it in "
        "ElasticRunner, or say in NOT_ASKED_OF_OUR_RUNNER why nobody gets there (not both)"
    )


def test_what_is_not_asked_is_still_in_vllm() -> None:
    """The list of exceptions would outlive what it excuses."""
    since = {name: ASKED_SINCE.get(name, RELEASE) for name in NOT_ASKED_OF_OUR_RUNNER}
    asked = {name for name, release in since.items() if _number(release) <= _number(RELEASE)}
    assert asked <= set(runner_names())


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))


@pytest.mark.parametrize("path", WRAPPED)
def test_wrapped_method_takes_what_the_wrapper_reads(path: str) -> None:
    """Our wrapper would take one argument of vLLM's method for another."""
    signature = inspect.signature(original(resolve(path)))
    names = list(signature.parameters)
    assert names[: len(WRAPPED[path])] == WRAPPED[path], f"{VERSION}: {path}{signature}"


def test_class_methods_that_we_wrap() -> None:
    """cli_flags.py unwraps a class method and puts a static method back: both have to be that."""
    engine_args = resolve("vllm.engine.arg_utils:EngineArgs")
    for name, kind in (("add_cli_args", staticmethod), ("from_cli_args", classmethod)):
        assert isinstance(inspect.getattr_static(engine_args, name), kind), f"{VERSION}: {name}"
