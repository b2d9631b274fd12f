# SPDX-License-Identifier: Apache-2.0
"""The forward of every family: rows that join at their layers, and what is stored between them.

It branches on the plan and never on data. Attention is bidirectional and independent for each
query row once a layer's new keys and values are written, so rows of one request that join at
different layers need no merging.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsLoRA
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix

from vllm_elastic.config import elastic_config_of
from vllm_elastic.models.hidden_states import HiddenStateCache
from vllm_elastic.models.layer_pass import Layer, LayerAsWritten, LayerAttention, NoCache, leading
from vllm_elastic.models.layers import PreNormBlock
from vllm_elastic.models.registry import traits_of
from vllm_elastic.models.rows import (
    AttentionCall,
    LayerRows,
    PassRows,
    Recorder,
    RowAdapters,
    bucket,
)

FUSED: dict[str, dict[str, str | int]] = {
    "qkv_proj": {"q_proj": "q", "k_proj": "k", "v_proj": "v"},
    "gate_up_proj": {"gate_proj": 0, "up_proj": 1},
}
"""A fused linear layer -> the layers of checkpoints that are its parts, and vLLM's name of each."""

_PART_OF = {part: (fused, name) for fused, parts in FUSED.items() for part, name in parts.items()}

_NO_SCALES = WeightsMapper(orig_to_new_regex={re.compile(r"\.[qkv]_(scale|zero_point)$"): None})
"""Leaves out a quantised checkpoint's scales of keys and values, which are kept as computed."""


class DiffusionTransformer(nn.Module, SupportsLoRA):
    """Embedding, blocks, norm and head, with paged keys, values and hidden states.

    A family is a subclass that makes its blocks and says how its checkpoints name them.

    Args:
        make_block: a block by the prefix of its name.
        norm: before the head.
        rows_of_embedding: rows of the embedding and of the head.
        tied: the head is the embedding.

    Attributes:
        hf_to_vllm_mapper: from a checkpoint's names to ours, a fused layer's parts still apart.
            vLLM takes by it what a quantised checkpoint says of its layers.
        packed_modules_mapping: the parts of fused layers, for vLLM.
        embedding_modules: beside linear layers, what an adapter may change; vLLM's names.
        loaded_apart: parts of parameters' names that a family does not load by ``load_named``.
        half_loaded: a load ended before its checkpoint did: weights of two are mixed.
    """

    hf_to_vllm_mapper: ClassVar[WeightsMapper]
    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        fused: list(parts) for fused, parts in FUSED.items()
    }
    embedding_modules: ClassVar[dict[str, str]] = {"lm_head": "output_embeddings"}
    loaded_apart: tuple[str, ...] = ()
    half_loaded = False

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        width: int,
        num_layers: int,
        vocab_size: int,
        rows_of_embedding: int,
        tied: bool,
        norm: nn.Module,
        make_block: Callable[[str], PreNormBlock],
    ) -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config  # adapters' layers are given it
        self.width = width
        self.num_layers = num_layers
        self.tied = tied
        self.embed_tokens = VocabParallelEmbedding(rows_of_embedding, width)
        self.blocks = nn.ModuleList(
            make_block(maybe_prefix(prefix, f"blocks.{i}")) for i in range(num_layers)
        )
        self._layers = [LayerAsWritten(block) for block in self.blocks]
        # Layer 0's input is the embedding of the canvas and needs no storage, unless images are
        # in it.
        self.input_states: HiddenStateCache | None = None
        if traits_of(vllm_config.model_config.hf_config).stores_input:
            self.input_states = HiddenStateCache(
                width, vllm_config, maybe_prefix(prefix, "hidden_states.0")
            )
        self.hidden_stride = elastic_config_of(vllm_config).hidden_stride
        self.hidden_states = nn.ModuleList(
            HiddenStateCache(width, vllm_config, maybe_prefix(prefix, f"hidden_states.{i}"))
            for i in range(self.hidden_stride, num_layers, self.hidden_stride)
        )
        self.norm = norm
        self.lm_head = ParallelLMHead(
            rows_of_embedding,
            width,
            quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed_tokens)
        self.logits_processor = LogitsProcessor(vocab_size)
        # The first load has to fill everything; later ones may bring parts (weight transfer).
        self._to_be_filled = vllm_config.load_config.load_format != "dummy"
        self._quantised = vllm_config.quant_config is not None
        self._names = self.hf_to_vllm_mapper
        if vllm_config.quant_config is not None:
            self._names |= vllm_config.quant_config.get_checkpoint_weight_mapper() | _NO_SCALES

    @property
    def attention_layers(self) -> list[Attention]:
        """vLLM's attention layers, first to last."""
        return [block.attn for block in self.blocks]

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """vLLM takes a class for a language model by these two names. Ours is run by ``run``."""
        raise NotImplementedError("a pass over rows and join layers is run by `run`")

    def pass_context(self) -> AbstractContextManager[None]:
        """Is entered around a pass, and around a part of one that is run by itself."""
        return nullcontext()

    def run(
        self,
        rows: PassRows,
        recorder: Recorder | None = None,
        layers: Sequence[Layer] | None = None,
    ) -> torch.Tensor:
        """Run a pass.

        Args:
            recorder: keeps what the pass's measurements need; None: it measures nothing.
            layers: stand-ins for the model's own, which compute the same in another way.

        Returns:
            [W filled up, d] final normed hidden states of the rows whose candidates are wanted.

        Raises:
            RuntimeError: rows join at a layer whose input is not stored.
        """
        x = self._embed(rows)
        before: LayerRows | None = None
        computed = zip(self._layers if layers is None else layers, self.blocks, strict=True)
        with self.pass_context():
            for number, (layer, block) in enumerate(computed):
                now = rows.layers[number]
                if now is None:
                    continue
                if number:
                    x = self._store_and_join(number, x, before, now)
                window = rows.window if number == self.num_layers - 1 else None
                attention = LayerAttention(number, block.attn, now, window, recorder)
                x = layer(x, self._with_old(number, x, now, recorder), attention)
                before = now
        return self.norm(x)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [W, vocab_size] of rows [W, d], on all ranks."""
        return self.logits_processor(self.lm_head, hidden_states)

    # One layer of a pass, in order.

    def _embed(self, rows: PassRows) -> torch.Tensor:
        """Layer 0's input [R0 filled up, d]."""
        # A pass without rows at layer 0 (a replay) spares the ranks a reduction of nothing.
        if not len(rows.tokens):
            return self.embed_tokens.weight.new_empty(0, self.width)
        x = self.embed_tokens(rows.tokens)
        if rows.stored is None:
            return x
        if self.input_states is None or rows.layers[0] is None:
            raise RuntimeError("rows start from stored inputs, of which the model keeps none")
        # All rows' slots are read, so that the shape does not depend on what they hold.
        stored = self.input_states.read(leading(rows.layers[0].slots, len(x)))
        return torch.where(rows.stored[:, None], stored, x)

    def store_inputs(self, inputs: torch.Tensor, slots: torch.Tensor) -> None:
        """Keep layer 0's input of rows [R, d] that no token stands for, at slots [R] (int64).

        Raises:
            RuntimeError: the model's traits say that it has no such rows.
        """
        if self.input_states is None:
            raise RuntimeError("the model keeps no inputs of layer 0 (DecodingTraits.stores_input)")
        self.input_states.write(inputs, slots)

    def _store_and_join(
        self, layer: int, x: torch.Tensor, before: LayerRows | None, now: LayerRows
    ) -> torch.Tensor:
        """Store the layer's input, and put the rows that join here behind those that are on."""
        nth, between = divmod(layer, self.hidden_stride)
        if between:
            if now is not before:
                raise RuntimeError(f"rows join at layer {layer}, whose input is not stored")
            return x
        store = self.hidden_states[nth - 1]
        num_on = 0
        if before is not None:
            num_on = before.num_rows
            store.write(x, leading(before.slots, before.num_finished))
        if now is before:
            return x
        joining = store.read(now.slots[num_on : now.num_rows])
        filling = x.new_zeros(now.num_finished - now.num_rows, self.width)
        return torch.cat([x[:num_on], joining, filling])

    def _with_old(
        self, layer: int, x: torch.Tensor, now: LayerRows, recorder: Recorder | None
    ) -> torch.Tensor:
        """The layer's input, and behind the active rows the tested ones' as it was stored."""
        nth, between = divmod(layer, self.hidden_stride)
        if recorder is None or recorder.old_inputs is None or between:
            return x
        # A tested position's token has not changed: its input of layer 0 is its old one.
        old = recorder.old_inputs[nth - 1] if nth else x[recorder.tested_rows]
        filling = x.new_zeros(len(now.positions) - now.num_rows - len(old), self.width)
        return torch.cat([x[: now.num_rows], old, filling])

    # Memory and weights.

    def run_without_cache(
        self,
        num_rows: int,
        num_tested: int,
        chunk_rows: int,
        adapters: RowAdapters | None = None,
    ) -> torch.Tensor:
        """Allocate what a pass of so many rows allocates at its peak.

        One layer is enough, all are alike; attention itself is left out, there is no cache yet.

        Args:
            num_tested: of the rows, projected once more as they were stored.
            chunk_rows: rows that are worked on at a time.
            adapters: of all rows, tested ones once more; None: none.

        Returns:
            [num_rows filled up, d] of no meaning.
        """
        device, num_finished = self.embed_tokens.weight.device, bucket(num_rows)
        positions = torch.zeros(bucket(num_rows + num_tested), dtype=torch.int64, device=device)
        rows = LayerRows(
            num_rows=num_rows,
            num_finished=num_finished,
            positions=positions,
            slots=positions,
            num_queries=0,
            calls=[
                AttentionCall(start, min(start + chunk_rows, num_rows))
                for start in range(0, num_rows, chunk_rows)
            ],
            adapters=adapters,
        )
        attention = NoCache(0, self.blocks[0].attn, rows, None, None)
        x = self.embed_tokens(positions[:num_finished])
        old = x[: len(positions) - num_finished]
        with self.pass_context():
            return self.norm(
                self._layers[0](x, torch.cat([x, old]) if num_tested else x, attention)
            )

    def load_named(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors; returns the parameters that were filled.

        Raises:
            ValueError: a tensor that the model does not have, or none for one that it has.
        """
        # Where adapters are on, a layer's own weights are one level down.
        params = {_own_name(name): param for name, param in self.named_parameters()}
        loaded: set[str] = set()
        filled: set[str] = set()  # likewise, a fused layer's parts apart
        for full_name, weight in weights:
            part = self._names.map_name(full_name)
            if part is None or (self.tied and part.startswith("lm_head.")):
                continue
            parent, module, suffix = _split(part)
            fused, shard = _PART_OF.get(module, (module, None))
            name = part if shard is None else f"{parent}.{fused}.{suffix}"
            if name not in params:
                if self._quantised and suffix == "bias" and not weight.any():
                    continue  # AutoGPTQ gives every layer one
                raise ValueError(
                    f"{type(self).__name__} has no tensor {full_name!r} (looked for {name!r})."
                )
            param = params[name]
            loader = getattr(param, "weight_loader", default_weight_loader)
            self.half_loaded = True
            loader(param, weight) if shard is None else loader(param, weight, shard)
            loaded.add(name)
            filled.add(part)
        if self.tied:
            loaded.add("lm_head.weight")
        if self._to_be_filled:
            self._refuse_unfilled(filled)
            self._to_be_filled = False
        self.half_loaded = False
        return loaded

    def weights_replaced(self) -> None:
        """After a load in place: a tied head has no tensor of its own in a checkpoint, so vLLM does
        not see that the copy which it packs on CPUs has to be made anew."""
        if self.tied:
            self.lm_head.quant_method.process_weights_after_loading(self.lm_head)

    def _refuse_unfilled(self, filled: set[str]) -> None:
        """vLLM looks for what a checkpoint lacks too, but not in linear layers.

        What belongs to a quantised layer is for its method to say: one tensor of it is enough.
        """
        wanted = [
            part
            for name in map(_own_name, dict(self.named_parameters()))
            if not any(apart in name for apart in self.loaded_apart)
            for part in _parts(name)
        ]
        if self._quantised:
            wanted = list(dict.fromkeys(part.rpartition(".")[0] for part in wanted))
            filled = {part.rpartition(".")[0] for part in filled}
        missing = [part for part in wanted if part not in filled]
        if missing:
            shown = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
            raise ValueError(
                f"the checkpoint has nothing for {len(missing)} of {type(self).__name__}'s "
                f"weights: {shown}. Is it another architecture, or were files left out?"
            )


def _own_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _split(name: str) -> tuple[str, str, str]:
    """A parameter's name as what its layer is in ("" if nothing), the layer, the parameter."""
    path, _, suffix = name.rpartition(".")
    parent, _, module = path.rpartition(".")
    return parent, module, suffix


def _parts(name: str) -> list[str]:
    """A parameter's name, or of a fused layer the names of its parts."""
    parent, module, suffix = _split(name)
    return [f"{parent}.{part}.{suffix}" for part in FUSED[module]] if module in FUSED else [name]
