# SPDX-License-Identifier: Apache-2.0
"""Executes step plans: owns the weights and the paged keys, values and hidden states.

Keeps nothing of a request between steps but what is in its KV blocks, and decides nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload
from vllm.tasks import SupportedTask
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache

from vllm_elastic.config import elastic_config_of
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.models import ranks
from vllm_elastic.models.registry import traits_of
from vllm_elastic.models.rows import bucket
from vllm_elastic.runner.adapters import Adapters
from vllm_elastic.runner.batch import ONE_BATCH_AT_A_TIME, PassLayout
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.cuda_graphs import CudaGraphs, capturing
from vllm_elastic.runner.download import Download
from vllm_elastic.runner.executor import (
    CompiledExecutor,
    EagerExecutor,
    GraphExecutor,
    PassExecutor,
    WholePassExecutor,
)
from vllm_elastic.runner.graphed_pass import (
    AllQueries,
    GraphedPasses,
    PassInputs,
    bytes_of_passes,
    most_requests,
)
from vllm_elastic.runner.head import Head
from vllm_elastic.runner.images import store_images
from vllm_elastic.runner.in_flight import ElasticRunnerOutput, PassInFlight
from vllm_elastic.runner.limits import limits_of
from vllm_elastic.runner.options import RunnerOptions
from vllm_elastic.runner.quantised_products import check_products
from vllm_elastic.runner.row_order import RowOrder
from vllm_elastic.runner.statistics import attention_sums
from vllm_elastic.runner.statistics.pass_statistics import statistics_of
from vllm_elastic.runner.trial_run import trial_run
from vllm_elastic.runner.upload import Upload
from vllm_elastic.runner.warm_up_passes import warm_up_passes

logger = init_logger("vllm.vllm_elastic.runner")


class ElasticRunner:
    """The model runner behind ``ElasticWorker``; the same on CPU and GPU."""

    # Asked at every step by the GPU worker where Triton is installed (model runner V2).
    is_pooling_model = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.device = device
        self.max_chunk_rows = vllm_config.scheduler_config.max_num_batched_tokens
        # Bytes that the weights take; the GPU worker asks.
        self.model_memory_usage = 0
        self.traits = traits_of(self.model_config.hf_config)
        self.model: Any = None
        self._adapters: Adapters | None = None  # without --enable-lora
        self.kv_caches: dict[str, torch.Tensor] = {}
        self._upload = Upload(device)
        # Whether vLLM queues a step while another one runs (--async-scheduling).
        self._overlaps = vllm_config.max_concurrent_batches > 1
        self._queued: PassInFlight | None = None  # until vLLM asks for its tokens
        self._graphs: CudaGraphs | None = None
        self._all_queries: AllQueries | None = None
        self._compiling: float | None = None  # seconds, once it was tried

    # Called by the worker at start, in this order.

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if self.device.type == "cpu":
            self._load_model()
        else:
            with DeviceMemoryProfiler(self.device) as profiler:
                self._load_model()
            self.model_memory_usage = profiler.consumed_memory
        self._executor: PassExecutor = EagerExecutor(self.model)

    def _load_model(self) -> None:
        self.model = get_model(vllm_config=self.vllm_config)
        if self.device.type == "cpu" and self.vllm_config.quant_config is not None:
            check_products(self.model, str(self.model_config.quantization))
        if self.vllm_config.lora_config is not None:
            self._adapters = Adapters(self.model, self.vllm_config, self.device)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return get_kv_cache_spec(self.vllm_config)

    @torch.inference_mode()
    def profile_run(self, randomize_inputs: bool = False) -> None:
        """Allocate what the limits of a step allow, so that vLLM can size the KV cache (GPU).

        Layers' graphs read no KV cache, so they are captured here already: what they take is
        measured. Whole passes' do: for them there is as much room as these suggest.
        """
        counts, whole, _ = RunnerOptions.of_engine(self.vllm_config)
        num_bytes = 0
        if counts:
            # What vLLM's experts keep grows in it: a graph would go on pointing at what was there.
            self._trial_run()
            num_bytes = bytes_of_passes(self._capture_graphs(counts), len(counts), len(whole))
        if whole:
            last = self.traits.num_layers - 1
            elastic = elastic_config_of(self.vllm_config)
            read_layers = range(last, -1, -elastic.attention_stride)
            self._all_queries = AllQueries(self.model, whole[-1], read_layers)
        of_passes = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._trial_run()
        del of_passes

    def _trial_run(self) -> None:
        requests = self.vllm_config.scheduler_config.max_num_seqs
        limits = limits_of(self.vllm_config)
        canvas = self.model_config.max_model_len
        trial_run(self.model, self.traits, limits, requests, canvas, self._upload, self._adapters)

    def _capture_graphs(self, counts: list[int]) -> int:
        """Bytes that CUDA keeps of them.

        Raises:
            RuntimeError: the device refuses.
        """
        executor = GraphExecutor(self.model)
        remedy = "--enforce-eager serves without them, --max-cudagraph-capture-size with fewer"
        self._graphs = CudaGraphs(self.device)
        with capturing(self._graphs, "each layer", len(counts), remedy) as taken:
            executor.capture(self._graphs, counts)
        self._executor = executor
        return taken.by_cuda

    def _capture_passes(self, counts: list[int]) -> None:
        """What they keep of numbers on their way lies in the layers' pool.

        Raises:
            RuntimeError: the device refuses.
        """
        group = self._attention_group
        builder = group.get_metadata_builder()
        requests = most_requests(builder, self.vllm_config, group.kv_cache_spec)
        if not requests:
            backend = group.backend.get_name()
            logger.info("whole passes are not captured: %s takes no part in a graph", backend)
            return
        assert self._graphs is not None and self._all_queries is not None, "layers' come first"
        canvas = self.model_config.max_model_len
        inputs = PassInputs(self.device, counts[-1], requests, self.cache.table_width(canvas))
        passes = GraphedPasses(self.model, inputs, self._all_queries)
        remedy = "the cudagraph_mode PIECEWISE serves without them"
        with capturing(self._graphs, "whole passes", len(counts), remedy):
            passes.capture(self._graphs, counts, builder, canvas)
        self._executor = WholePassExecutor(passes, self._executor)

    def warming_up_model(self) -> None:
        """Asked by vLLM's CPU worker before it sizes the KV cache, so that what compiling takes is
        measured; not asked where the operator names the cache's size."""
        self.compile_layers()

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> None:
        """Allocate the paged cache and learn how the backend lays keys out in it."""
        if len(kv_cache_config.kv_cache_groups) != 1:
            raise RuntimeError(
                "keys, values and hidden states must share one KV cache group, got "
                f"{len(kv_cache_config.kv_cache_groups)}"
            )
        with set_current_vllm_config(self.vllm_config):
            groups, _, kernel_block_sizes = init_attn_backend(
                kv_cache_config, self.vllm_config, self.device
            )
            context = self.vllm_config.compilation_config.static_forward_context
            self.kv_caches = init_kv_cache(
                context,
                kv_cache_config,
                self.device,
                kernel_block_sizes,
                self.vllm_config,
                kv_cache_allocation_context,
            )
        names = {layer.layer_name for layer in self.model.attention_layers}
        self._attention_group = next(g for g in groups[0] if names & set(g.layer_names))
        backend = self._attention_group.backend.get_name()
        if backend in ONE_BATCH_AT_A_TIME:
            raise RuntimeError(
                f"vLLM chose the attention backend {backend}, which prepares one batch at a time; "
                "name another one by --attention-backend, such as TRITON_ATTN (vllm_elastic)."
            )
        self.cache = CacheView.of(self.model, kv_cache_config)
        attention_sums.warm_up(self.cache)
        self._log_capacity(kv_cache_config)

    def _log_capacity(self, kv_cache_config: KVCacheConfig) -> None:
        (group,) = kv_cache_config.kv_cache_groups
        block_size = self.cache.block_size
        token_bytes = group.kv_cache_spec.page_size_bytes // block_size
        stores = [*self.model.hidden_states]
        if self.model.input_states is not None:
            stores.append(self.model.input_states)
        hidden_bytes = sum(store.width * store.dtype.itemsize for store in stores)
        canvas = self.model_config.max_model_len
        canvases = (kv_cache_config.num_blocks - 1) // -(-canvas // block_size)
        logger.info(
            "a canvas position costs %d bytes%s (%d of them hidden states%s); %d full canvases of "
            "%d positions fit; keys are stored %s by %s",
            token_bytes,
            f" on each of {ranks.count()} ranks" if ranks.count() > 1 else "",
            hidden_bytes,
            ", layer 0's input among them" if self.model.input_states is not None else "",
            canvases,
            canvas,
            self.cache.key_layout.name,
            type(self.model.attention_layers[0].impl).__name__,
        )

    @torch.inference_mode()
    def compile_layers(self) -> float:
        """Once, however often it is asked for. Where it fails, passes stay eager.

        Returns:
            seconds that it took; 0 where flags switch it off, and where it failed.
        """
        if self._compiling is None:
            wanted = RunnerOptions.of_engine(self.vllm_config).compiles
            self._compiling = self._compile_layers() if wanted else 0.0
        return self._compiling

    def _compile_layers(self) -> float:
        started = time.perf_counter()
        try:
            self._executor = CompiledExecutor(self.model, bucket(self.max_chunk_rows))
        except Exception as error:  # there are many compilers
            logger.warning(
                "layers are not compiled (%s); passes run operator by operator, with the same "
                "numbers. A compiler wants g++ and Python's headers; --enforce-eager does not try",
                _reason(error),
            )
            return 0.0
        taken = time.perf_counter() - started
        logger.info("compiling a layer took %.1f s; --enforce-eager switches it off", taken)
        return taken

    @torch.inference_mode()
    def warm_up(self) -> None:
        """What some cards compile at a first call is compiled now, and what fails there ends the
        start."""
        started = time.perf_counter()
        canvas, block_size = self.model_config.max_model_len, self.cache.block_size
        for plans in warm_up_passes(self.traits, canvas, self.max_chunk_rows, block_size):
            self.run(plans)
        logger.info("warm-up passes took %.1f s", time.perf_counter() - started)
        counts = RunnerOptions.of_engine(self.vllm_config).whole_pass_rows
        if counts:
            self._capture_passes(counts)

    # Called once a step.

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None
    ) -> ModelRunnerOutput | None:
        """Run the plans that the scheduler put on its output (``elastic_plans``).

        Beside them it has the images of those whose KV blocks are fresh (``scheduled_new_reqs``).
        None where steps overlap: ``sample_tokens`` has the pass, which may still be running.
        """
        plans: list[PassPlan] = getattr(scheduler_output, "elastic_plans", [])
        for request in scheduler_output.scheduled_new_reqs:
            store_images(self.model, request, self.cache.block_size, self.device)
        if not plans:
            return EMPTY_MODEL_RUNNER_OUTPUT
        if self._overlaps:
            self._queued = None  # a start that fails leaves nothing to hand over
            self._queued = self.start(plans)
            return None
        results = self.run(plans)
        if results is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        return ElasticRunnerOutput.of(plans, results)

    def sample_tokens(self, grammar_output: Any) -> PassInFlight | None:
        """The pass that was started last, to be waited for; None on ranks that do not report."""
        queued, self._queued = self._queued, None
        return queued

    def run(self, plans: list[PassPlan]) -> list[PassResult] | None:
        """``start`` a pass and wait for its results."""
        in_flight = self.start(plans)
        return None if in_flight is None else in_flight.results()

    def start(self, plans: list[PassPlan]) -> PassInFlight | None:
        """One forward pass over the rows of all plans; None on the ranks that do not report.

        On a GPU it is queued behind the passes that were started before, and nothing of it is
        waited for here. So what a pass frees or overwrites, an earlier one has done with.
        """
        faults = {} if self._adapters is None else self._adapters.activate(plans)
        if self.model.half_loaded:
            why = "a reload of the weights ended half-way; reload them as a whole"
            faults |= dict.fromkeys(range(len(plans)), why)
        # What goes where.
        self._upload.start()
        order = RowOrder.of(plans, self.cache.block_size)
        statistics = statistics_of(plans, order, self.cache, self._upload)
        head = Head(plans, self.traits, self._upload)
        layout = PassLayout(
            plans,
            order,
            self._upload,
            self._attention_group,
            self.cache,
            self.max_chunk_rows,
            None if self._adapters is None else self._adapters.of_pass(plans),
        )
        run = self._executor.prepare(layout, statistics)
        half_filled = self._half_filled(plans)
        # On the device.
        self._upload.send()
        if half_filled is not None:
            self.cache.keys.index_fill_(1, half_filled, 0)
        statistics.before(self.model_config.dtype)
        hidden = run()
        candidates = head.predict(self.model, hidden, layout.window_adapters)
        del hidden  # the statistics need the room
        statistics.after()
        if candidates is None:
            return None
        # Back.
        download = Download()
        measured = statistics.results(download)
        return PassInFlight(plans, head.slices, candidates, measured, download, faults)

    def _half_filled(self, plans: list[PassPlan]) -> torch.Tensor | None:
        """Blocks that canvases begin to fill, in part, and that have to be zeroed; None: none.

        Attention kernels multiply a whole block by probabilities that are 0 beyond T, and a NaN
        that an earlier owner left there would survive that.
        """
        size = self.cache.block_size
        last = [
            plan.block_ids[-1]
            for plan in plans
            if len(plan.tokens) % size and len(plan.tokens) // size * size >= plan.num_written
        ]
        if not last:
            return None
        blocks = self.cache.kernel_blocks(np.array(last, dtype=np.int32))
        return self._upload.put(blocks.astype(np.int64))

    # Asked by vLLM's worker now and then.

    def get_model(self) -> nn.Module:
        return self.model

    @torch.inference_mode()
    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, torch.Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        """Load weights in place: after a sleep of level 2, or other ones for the same model.

        Raises:
            ValueError: quantised weights on a CPU.
            Exception: whatever keeps weights from being read or taken. Where none had been taken
                yet, everything is as it was; else requests fail until a load succeeds.
        """
        if self.device.type == "cpu" and self.vllm_config.quant_config is not None:
            # Its int8 products go on reading scales that a load in place has freed (vLLM 0.32).
            raise ValueError(
                "quantised weights cannot be reloaded on a CPU; start the server anew "
                "(vllm_elastic)."
            )
        source = ("model", "model_weights", "revision")
        before = {name: getattr(self.model_config, name) for name in source}
        try:
            reload_weights(
                self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format
            )
        except Exception:
            finalize_layerwise_reload(self.model, self.model_config)
            for name, value in before.items():
                setattr(self.model_config, name, value)
            raise
        finally:
            self.model.weights_replaced()
        self.reset_lora_state()

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def take_draft_token_ids(self) -> None:
        return None

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None:
        """An image's features are in its request's KV blocks and nowhere else."""

    def shutdown(self) -> None:
        self.kv_caches.clear()

    def get_draft_model(self) -> None:
        """Asked by the GPU worker's ``sleep`` and weight updates: there is none."""
        return None

    # Adapters (LoRA).

    def add_lora(self, lora_request: LoRARequest) -> bool:
        return self.adapters.add(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        return self.adapters.remove(lora_id)

    def pin_lora(self, lora_id: int) -> bool:
        return self.adapters.pin(lora_id)

    def list_loras(self) -> set[int]:
        return self.adapters.ids()

    def reset_lora_state(self) -> None:
        """Asked by the GPU worker after a weight update."""
        if self._adapters is not None:
            self._adapters.forget()

    @property
    def adapters(self) -> Adapters:
        """Raises:
        RuntimeError: there are none, and yet the server asks: for --lora-modules, at
            /v1/load_lora_adapter.
        """
        if self._adapters is None:
            raise RuntimeError("adapters (LoRA) are off; start with --enable-lora (vllm_elastic).")
        return self._adapters


def _reason(error: Exception) -> str:
    """One line of what a compiler says."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0]).strip()
