# SPDX-License-Identifier: Apache-2.0
"""LLaDA (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5) from vLLM's parallel layers.

A Llama-like transformer without a causal mask: pre-RMSNorm, rotate-half RoPE, SwiGLU, no biases.
The forward takes rows and join layers (``RowBatch``); it branches on the plan, never on data.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm import _custom_ops as kernels
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import maybe_prefix

from vllm_elastic.config import ElasticConfig
from vllm_elastic.models.hidden_states import HiddenStateCache
from vllm_elastic.models.llada_config import LLaDAConfig
from vllm_elastic.runner.row_batch import Chunk, RowBatch, Stage, WindowRows
from vllm_elastic.runner.statistics.inputs import StatisticsInputs

_MULTIPLES = ((64, 8), (128, 16), (1024, 32))
"""Up to so many rows, to a multiple of this: 40 numbers of rows, and from 33 rows on
less than a quarter of filling (a product's time is proportional to its rows)."""


def multiply(linear: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A linear layer's output for rows [R, d], without its bias.

    Plans have another number of rows at nearly every step, and oneDNN compiles a product for each
    number that it has not seen: milliseconds, where a window pass's product takes microseconds.
    So on a CPU few rows are filled up to a multiple; for many the copy would cost more.
    """
    count = len(rows)
    multiple = next((multiple for most, multiple in _MULTIPLES if count <= most), 1)
    missing = -count % multiple
    if not missing or not rows.is_cpu:
        return linear(rows)[0]
    if isinstance(linear, RowParallelLinear) and linear.tp_size > 1:
        return linear(rows)[0]  # ranks would send each other the filling
    return linear(nn.functional.pad(rows, (0, 0, 0, missing)))[0][:count]


class KernelRMSNorm(RMSNorm):
    """vLLM's RMSNorm by its compiled kernel.

    In eager mode on CPU vLLM takes half a dozen torch operators for it, which for a window pass's
    rows is 25 times as long: they are there for a compiler to fuse.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(x)
        kernels.rms_norm(out, x, self.weight.data, self.variance_epsilon)
        return out


class LLaDAAttention(nn.Module):
    """Bidirectional attention of a pass's rows over all T stored positions of their canvases."""

    def __init__(self, config: LLaDAConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.d_model // config.n_heads
        self.num_heads = config.n_heads // tp_size
        self.num_kv_heads = max(1, config.n_kv_heads // tp_size)
        self.scale = self.head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            config.d_model,
            self.head_dim,
            config.n_heads,
            config.n_kv_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn_out = RowParallelLinear(
            config.d_model,
            config.d_model,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn_out",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max(config.max_sequence_length, vllm_config.model_config.max_model_len),
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            is_neox_style=True,
        )
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def project(
        self, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [R, Hq, D], rotated k [R, Hkv, D] and v [R, Hkv, D] of normed rows [R, d]."""
        qkv = multiply(self.qkv_proj, hidden)
        q_size = self.num_heads * self.head_dim
        kv_size = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        q, k = self.rotary_emb(positions, q.contiguous(), k.contiguous())
        return (
            q.view(-1, self.num_heads, self.head_dim),
            k.view(-1, self.num_kv_heads, self.head_dim),
            v.view(-1, self.num_kv_heads, self.head_dim),
        )

    def write(self, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Put keys and values [R, Hkv, D] into their slots [R] of the paged cache."""
        attn = self.attn
        attn.impl.do_kv_cache_update(attn, k, v.contiguous(), attn.kv_cache, slots)

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: list[Chunk]
    ) -> torch.Tensor:
        """Attention output [R, Hq * D] of the queries [R, Hq, D], chunk by chunk."""
        output = torch.empty_like(q)
        attn = self.attn
        for chunk in chunks:
            rows = slice(chunk.start, chunk.stop)
            attn.impl.forward(
                attn, q[rows], k[rows], v[rows], attn.kv_cache, chunk.metadata, output[rows]
            )
        return output.view(q.shape[0], -1)


class LLaDABlock(nn.Module):
    """One transformer block, over the rows of a stage."""

    def __init__(self, config: LLaDAConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.attn_norm = KernelRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.ff_norm = KernelRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.self_attn = LLaDAAttention(config, vllm_config, prefix)
        self.gate_up_proj = MergedColumnParallelLinear(
            config.d_model,
            [config.mlp_hidden_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.ff_out = RowParallelLinear(
            config.mlp_hidden_size,
            config.d_model,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.ff_out",
        )
        self.act = SiluAndMul()

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        return multiply(self.ff_out, self.act(multiply(self.gate_up_proj, hidden)))

    def forward(
        self,
        layer: int,
        x: torch.Tensor,
        old_x: torch.Tensor | None,
        stage: Stage,
        slots: torch.Tensor,
        statistics: StatisticsInputs | None,
        final: WindowRows | None = None,
    ) -> torch.Tensor:
        """One block for the rows that are active at this layer.

        Args:
            x: [R, d] the rows' input; R = stage.num_rows.
            old_x: [M, d] the tested rows' input as stored before this pass, or None.
            slots: int64 [R] of the paged cache.
            final: given to the last block: only these rows' output is wanted. All rows' keys and
                values are written all the same.

        Returns:
            [R, d] the next layer's input; [W, d] from the last block.
        """
        attention = self.self_attn
        num_rows = stage.num_rows
        rows_x = x if old_x is None else torch.cat([x, old_x])
        if len(stage.chunks) == 1:
            positions = stage.positions[: rows_x.shape[0]]
            q, k, v = attention.project(self.attn_norm(rows_x), positions)
        else:
            # Keys and values of all chunks first: every chunk attends to all of them.
            parts = [
                attention.project(self.attn_norm(rows_x[start:stop]), stage.positions[start:stop])
                for start, stop in stage.spans(rows_x.shape[0])
            ]
            q, k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        if statistics is not None:
            statistics.save_layer(layer, q, num_rows, stage.num_queries)
        attention.write(k[:num_rows], v[:num_rows], slots)
        chunks = stage.chunks
        if final is None:
            q, k, v = q[:num_rows], k[:num_rows], v[:num_rows]
        else:
            x, q, k, v = (tensor[final.rows] for tensor in (x, q, k, v))
            chunks = final.chunks
        attended = attention.attend(q, k, v, chunks)
        if len(chunks) == 1:
            return self.finish(x, attended)
        return torch.cat(
            [self.finish(x[c.start : c.stop], attended[c.start : c.stop]) for c in chunks]
        )

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Add the attention's and the MLP's output to rows [R, d]."""
        x = x + multiply(self.self_attn.attn_out, attended)
        return x + self.mlp(self.ff_norm(x))


class LLaDAModelLM(nn.Module):
    """LLaDA with its paged keys, values and hidden states.

    Weight names are those of the released checkpoints (``model.transformer.*``).
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAConfig = vllm_config.model_config.hf_config
        self.config = config
        self.num_layers = config.n_layers
        self.d_model = config.d_model
        self.wte = VocabParallelEmbedding(config.embedding_size, config.d_model)
        self.blocks = nn.ModuleList(
            LLaDABlock(config, vllm_config, maybe_prefix(prefix, f"blocks.{i}"))
            for i in range(config.n_layers)
        )
        # Layer 0's input is the embedding of the canvas; it needs no storage.
        elastic = ElasticConfig.from_dict(vllm_config.additional_config.get("elastic"))
        self.hidden_stride = elastic.hidden_stride
        self.hidden_states = nn.ModuleList(
            HiddenStateCache(
                config.d_model, vllm_config, maybe_prefix(prefix, f"hidden_states.{i}")
            )
            for i in range(self.hidden_stride, config.n_layers, self.hidden_stride)
        )
        self.ln_f = KernelRMSNorm(config.d_model, eps=config.rms_norm_eps)
        self.lm_head = ParallelLMHead(
            config.embedding_size,
            config.d_model,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if config.weight_tying:
            self.lm_head = self.lm_head.tie_weights(self.wte)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.wte(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: RowBatch,
        statistics: StatisticsInputs | None = None,
    ) -> torch.Tensor:
        """Run a step plan.

        Args:
            input_ids: int64 [R0], tokens of the rows that join at layer 0.
            positions: int64 [R], canvas positions of all rows (kept in the stages as well).
            batch: rows sorted by join layer, their slots and their attention metadata.
            statistics: filled with what the attention statistics need, or None.

        Returns:
            [W, d] final normed hidden states of the rows whose candidates are wanted.
        """
        # A pass without rows at layer 0 (a replay) spares the ranks a reduction of nothing.
        x = self.wte(input_ids) if len(input_ids) else self.wte.weight.new_empty(0, self.d_model)
        old_inputs = old_x = None
        if statistics is not None and statistics.old_inputs is not None:
            old_inputs = statistics.old_inputs
            # A tested position's token has not changed: its embedding is its old input.
            old_x = x[statistics.tested_rows]
        num_rows = x.shape[0]
        for layer, block in enumerate(self.blocks):
            stage = batch.stage_of(layer)
            nth, between = divmod(layer, self.hidden_stride)
            if between:
                if stage.num_rows > num_rows:
                    raise RuntimeError(f"rows join at layer {layer}, whose input is not stored")
                old_x = None
            elif layer > 0:
                store = self.hidden_states[nth - 1]
                if num_rows:
                    store.write(x, batch.slots[:num_rows])
                if stage.num_rows > num_rows:
                    joining = store.read(batch.slots[num_rows : stage.num_rows])
                    x = torch.cat([x, joining]) if num_rows else joining
                if old_inputs is not None:
                    old_x = old_inputs[nth - 1]
            num_rows = stage.num_rows
            if num_rows:
                final = batch.window if layer == self.num_layers - 1 else None
                x = block(layer, x, old_x, stage, batch.slots[:num_rows], statistics, final)
        return self.ln_f(x)

    def run_without_cache(self, num_rows: int, num_window_rows: int) -> torch.Tensor:
        """What a pass of so many rows allocates at its peak, for vLLM's memory profiling.

        One block is enough, all are alike; attention itself is left out, there is no cache yet.

        Returns:
            logits [num_window_rows, vocab_size] of no meaning.
        """
        positions = torch.zeros(num_rows, dtype=torch.int64, device=self.wte.weight.device)
        x = self.wte(positions)
        block = self.blocks[0]
        q, _, _ = block.self_attn.project(block.attn_norm(x), positions)
        x = block.finish(x, q.view(num_rows, -1))
        return self.compute_logits(self.ln_f(x[:num_window_rows]))

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [W, vocab_size] of rows [W, d], on all ranks."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load LLaDA's own tensor names; returns the parameters that were filled.

        Raises:
            ValueError: a tensor that LLaDA does not have.
        """
        stacked: dict[str, tuple[str, str | int]] = {
            "q_proj": ("self_attn.qkv_proj", "q"),
            "k_proj": ("self_attn.qkv_proj", "k"),
            "v_proj": ("self_attn.qkv_proj", "v"),
            "ff_proj": ("gate_up_proj", 0),
            "up_proj": ("gate_up_proj", 1),
        }
        renamed = {"attn_out": "self_attn.attn_out"}
        params = dict(self.named_parameters())
        loaded: set[str] = set()
        for full_name, weight in weights:
            name = full_name.removeprefix("model.").removeprefix("transformer.")
            shard: str | int | None = None
            if name.startswith("blocks."):
                _, index, module, suffix = name.split(".", 3)
                if module in stacked:
                    module, shard = stacked[module]
                name = f"blocks.{index}.{renamed.get(module, module)}.{suffix}"
            elif name.startswith("ff_out."):
                if self.config.weight_tying:
                    continue
                name = name.replace("ff_out.", "lm_head.")
            if name not in params:
                raise ValueError(f"LLaDA has no tensor {full_name!r} (looked for {name!r}).")
            param = params[name]
            loader = getattr(param, "weight_loader", default_weight_loader)
            loader(param, weight) if shard is None else loader(param, weight, shard)
            loaded.add(name)
        if self.config.weight_tying:
            loaded.add("lm_head.weight")
        return loaded
