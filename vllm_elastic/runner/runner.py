# SPDX-License-Identifier: Apache-2.0
"""Executes step plans: owns the weights and the paged keys, values and hidden states.

Keeps nothing of a request between steps but what is in its KV blocks, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.tasks import SupportedTask
from vllm.utils.mem_utils import DeviceMemoryProfiler
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec, init_attn_backend, init_kv_cache

from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.models import ranks
from vllm_elastic.runner.attention_shape import AttentionShape
from vllm_elastic.runner.candidates import (
    constrain,
    logprobs_of,
    most_probable,
    postpone,
    sampled,
)
from vllm_elastic.runner.row_batch import RowBatch, RowLayout
from vllm_elastic.runner.statistics.inputs import StatisticsInputs

logger = init_logger("vllm.vllm_elastic.runner")


@dataclass
class ElasticRunnerOutput(ModelRunnerOutput):
    """vLLM's output with each request's pass result; tokens are the scheduler's to commit."""

    pass_results: list[PassResult] = field(default_factory=list)


class ElasticRunner:
    """The model runner behind ``ElasticWorker``; the same on CPU and GPU."""

    # Asked at every step by the GPU worker where Triton is installed (model runner V2).
    is_pooling_model = False

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.device = device
        self.max_chunk_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.elastic_config = ElasticConfig.from_dict(vllm_config.additional_config.get("elastic"))
        # Bytes that the weights take; the GPU worker asks.
        self.model_memory_usage = 0
        self.mask_token_id: int = self.model_config.hf_config.mask_token_id
        self.model: Any = None
        self.kv_caches: dict[str, torch.Tensor] = {}

    # Called by the worker at start, in this order.

    def load_model(self, load_dummy_weights: bool = False) -> None:
        if self.device.type == "cpu":
            self.model = get_model(vllm_config=self.vllm_config)
            return
        with DeviceMemoryProfiler(self.device) as profiler:
            self.model = get_model(vllm_config=self.vllm_config)
        self.model_memory_usage = profiler.consumed_memory

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        return get_kv_cache_spec(self.vllm_config)

    @torch.inference_mode()
    def profile_run(self, randomize_inputs: bool = False) -> None:
        """Allocate what a full row budget needs, so that vLLM can size the KV cache (GPU)."""
        seats = self.vllm_config.scheduler_config.max_num_seqs
        window_rows = min(self.max_chunk_rows, seats * self.elastic_config.window)
        logits = self.model.run_without_cache(self.max_chunk_rows, window_rows)
        most_probable(logits)

    def warming_up_model(self) -> None:
        """Nothing is compiled."""

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
        layers = [block.self_attn.attn for block in self.model.blocks]
        names = {layer.layer_name for layer in layers}
        self._attention_group = next(g for g in groups[0] if names & set(g.layer_names))
        self.block_size = layers[0].kv_cache.shape[2]
        attention = self.model.blocks[0].self_attn
        self.shape = AttentionShape(
            num_layers=len(layers),
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            key_layout=KeyLayout.measure(layers[0]),
            key_cache=_stack_views([layer.kv_cache for layer in layers]),
            hidden_rows=self._hidden_rows(),
            hidden_stride=self.model.hidden_stride,
        )
        self._log_capacity(kv_cache_config, type(layers[0].impl).__name__)

    def _hidden_rows(self) -> torch.Tensor:
        if self.model.hidden_states:
            return _stack_views([store.rows() for store in self.model.hidden_states])
        keys = self.model.blocks[0].self_attn.attn.kv_cache  # a model of one layer stores none
        width = self.model.d_model // ranks.count()
        return keys.new_empty(0, keys.shape[0] * self.block_size, width)

    def _log_capacity(self, kv_cache_config: KVCacheConfig, backend: str) -> None:
        (group,) = kv_cache_config.kv_cache_groups
        token_bytes = group.kv_cache_spec.page_size_bytes // self.block_size
        hidden_bytes = sum(layer.width * layer.dtype.itemsize for layer in self.model.hidden_states)
        canvas = self.model_config.max_model_len
        canvases = (kv_cache_config.num_blocks - 1) // -(-canvas // self.block_size)
        logger.info(
            "a canvas position costs %d bytes%s (%d of them hidden states); %d full canvases of "
            "%d positions fit; keys are stored %s by %s",
            token_bytes,
            f" on each of {ranks.count()} ranks" if ranks.count() > 1 else "",
            hidden_bytes,
            canvases,
            canvas,
            self.shape.key_layout.name,
            backend,
        )

    # Called once a step.

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, intermediate_tensors: Any = None
    ) -> ModelRunnerOutput:
        """Run the plans that the scheduler put on its output (``elastic_plans``)."""
        plans: list[PassPlan] = getattr(scheduler_output, "elastic_plans", [])
        results = self.run(plans) if plans else None
        if results is None:
            return EMPTY_MODEL_RUNNER_OUTPUT
        req_ids = [plan.request_id for plan in plans]
        return ElasticRunnerOutput(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=[[] for _ in plans],
            pass_results=results,
        )

    def run(self, plans: list[PassPlan]) -> list[PassResult] | None:
        """One forward pass over the rows of all plans; None on the ranks that do not report."""
        layout = RowLayout.of(plans, self.block_size)
        statistics = StatisticsInputs(plans, layout)
        self._plans = plans
        self._block_table = self._make_block_table(plans)
        batch = RowBatch.build(
            plans,
            layout,
            statistics.tested_positions,
            statistics.query_rows,
            self.max_chunk_rows,
            self._build_metadata,
            self.device,
        )
        self._clear_padding(plans)
        statistics.prepare(self.shape, self.device, self.model_config.dtype)
        hidden = self.model(batch.tokens, batch.positions, batch, statistics)
        logits = self.model.compute_logits(hidden)
        sums = statistics.partial_sums()
        sums.add_up()
        if not ranks.reports():
            return None
        # A mask that was committed would leave its position undecided.
        logits[:, self.mask_token_id] = float("-inf")
        raw: dict[
            int, tuple[torch.Tensor, int]
        ] = {}  # log probabilities are of what the model says
        for index, rows in enumerate(_window_slices(plans)):
            sampling = plans[index].sampling
            if sampling is not None and sampling.num_logprobs is not None:
                raw[index] = logits[rows].clone(), sampling.num_logprobs
        self._constrain(plans, logits)
        token_ids, probabilities = most_probable(logits)
        self._sample(plans, logits, token_ids, probabilities)
        tokens_np = token_ids.to(torch.int32).cpu().numpy()
        probabilities_np = probabilities.cpu().numpy()
        results = []
        measured = sums.measure()
        for index, rows in enumerate(_window_slices(plans)):
            logprobs = None
            if index in raw:
                raw_logits, count = raw[index]
                logprobs = logprobs_of(raw_logits, token_ids[rows], count)
            results.append(
                PassResult(
                    tokens_np[rows],
                    probabilities_np[rows],
                    logprobs=logprobs,
                    **measured[index],
                )
            )
        return results

    def _constrain(self, plans: list[PassPlan], logits: torch.Tensor) -> None:
        for plan, rows in zip(plans, _window_slices(plans), strict=True):
            if plan.sampling is not None:
                positions = torch.from_numpy(plan.window.astype(np.int64)).to(self.device)
                constrain(logits[rows], plan.sampling, positions)

    def _sample(
        self,
        plans: list[PassPlan],
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        probabilities: torch.Tensor,
    ) -> None:
        """Replace the most probable token where a request wants a random one; put ends last."""
        for plan, rows in zip(plans, _window_slices(plans), strict=True):
            if plan.sampling is not None and plan.sampling.temperature > 0:
                positions = torch.from_numpy(plan.window.astype(np.int64)).to(self.device)
                token_ids[rows], probabilities[rows] = sampled(
                    logits[rows], plan.sampling, plan.denoising_step, positions
                )
            if plan.sampling is not None and plan.sampling.last_token_ids:
                postpone(token_ids[rows], probabilities[rows], plan.sampling.last_token_ids)

    def _clear_padding(self, plans: list[PassPlan]) -> None:
        """Zero the block that a fresh canvas fills only in part.

        Attention kernels multiply a whole block by probabilities that are 0 beyond T, and a NaN
        that an earlier owner left there would survive that.
        """
        padded = [p.block_ids[-1] for p in plans if p.fresh and len(p.tokens) % self.block_size]
        if padded:
            self.shape.key_cache[:, torch.tensor(padded, device=self.device)] = 0

    def _make_block_table(self, plans: list[PassPlan]) -> np.ndarray:
        table = np.zeros((len(plans), max(len(p.block_ids) for p in plans)), dtype=np.int32)
        for row, plan in zip(table, plans, strict=True):
            row[: len(plan.block_ids)] = plan.block_ids
        return table

    def _build_metadata(self, pieces: list[tuple[int, int]]) -> Any:
        """Attention metadata of a chunk: each piece is one sequence of T keys, not causal."""
        owners = np.array([index for index, _ in pieces])
        lengths = np.array([length for _, length in pieces], dtype=np.int32)
        starts = np.zeros(len(pieces) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        keys = np.array([len(self._plans[i].tokens) for i in owners], dtype=np.int32)
        starts_cpu = torch.from_numpy(starts)
        keys_cpu = torch.from_numpy(keys)
        common = CommonAttentionMetadata(
            query_start_loc=starts_cpu.to(self.device),
            query_start_loc_cpu=starts_cpu,
            seq_lens=keys_cpu.to(self.device),
            seq_lens_cpu_upper_bound=keys_cpu,
            num_reqs=len(pieces),
            num_actual_tokens=int(lengths.sum()),
            max_query_len=int(lengths.max()),
            max_seq_len=int(keys.max()),
            block_table_tensor=torch.from_numpy(self._block_table[owners]).to(self.device),
            # Writes go through LLaDAAttention.write with the batch's own slots.
            slot_mapping=torch.empty(0, dtype=torch.int64, device=self.device),
            causal=False,
        )
        return self._attention_group.build_metadata(common)

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
        """Load weights in place: after a sleep of level 2, or other ones for the same model."""
        reload_weights(
            self.vllm_config, self.model, weights_iterator, weights_path, is_checkpoint_format
        )

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def sample_tokens(self, grammar_output: Any) -> None:
        return None

    def take_draft_token_ids(self) -> None:
        return None

    def reset_mm_cache(self) -> None: ...

    def reset_encoder_cache(self) -> None: ...

    def shutdown(self) -> None:
        self.kv_caches.clear()

    def get_draft_model(self) -> None:
        """Asked by the GPU worker's ``sleep`` and weight updates: there is none."""
        return None

    def reset_lora_state(self) -> None:
        """Asked by the GPU worker after a weight update: there is none."""


def _window_slices(plans: list[PassPlan]) -> list[slice]:
    """Each plan's rows among the window rows of all."""
    ends = np.cumsum([len(plan.window) for plan in plans]).tolist()
    return [slice(end - len(p.window), end) for p, end in zip(plans, ends, strict=True)]


def _stack_views(views: list[torch.Tensor]) -> torch.Tensor:
    """Per-layer views as one [L, ...] view without a copy.

    vLLM lays the layers out at a constant stride in one allocation.

    Raises:
        RuntimeError: it does not.
    """
    first = views[0]
    offsets = [view.storage_offset() for view in views]
    stride = offsets[1] - offsets[0] if len(offsets) > 1 else 0
    same_storage = {view.untyped_storage().data_ptr() for view in views}
    if len(same_storage) != 1 or offsets != [offsets[0] + i * stride for i in range(len(offsets))]:
        raise RuntimeError("the layers' KV caches are not at a constant stride in one allocation")
    return first.as_strided((len(views), *first.shape), (stride, *first.stride()), offsets[0])
