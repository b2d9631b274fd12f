# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``--attention-backend CUSTOM``: attention in both directions by xformers.

What vLLM asks of a backend, but for the operator itself (``paged_xformers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms.interface import DeviceCapability
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

_TESTED = "0.0.35"
_TOO_NEW_TRITON = (3, 9)
"""It has no block pointers any more, by which xformers' kernel reads and writes."""


def operator() -> Any:
    """The module that calls xformers."""
    from vllm_elastic.attention import paged_xformers

    return paged_xformers


def missing() -> str | None:
    """Which package the operator cannot do with, and the remedy; None: all is there."""
    try:
        xformers, triton = version("xformers"), version("triton")
    except PackageNotFoundError as error:
        return f"{error.name} is not installed: pip install 'vllm-elastic[xformers]'"
    if xformers.partition("+")[0] != _TESTED:
        return f"xformers {xformers} is not known to work: pip install xformers=={_TESTED}"
    if tuple(map(int, triton.split(".")[:2])) >= _TOO_NEW_TRITON:
        return f"xformers {xformers} does not run with Triton {triton}, only before 3.9"
    return None


class XFormersBackend(AttentionBackend):
    """Full attention over a paged canvas, for models that look both ways, on NVIDIA GPUs.

    Sizes, types and cards are those that the operator's ``not_supported_reasons`` allows, and of
    the head sizes those whose tiles fit into every such card's shared memory.
    """

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[XFormersImpl]:
        return XFormersImpl

    @staticmethod
    def get_builder_cls() -> type[XFormersMetadataBuilder]:
        return XFormersMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [16, 32, 64, 128, 256]

    @classmethod
    def supports_compute_capability(cls, capability: DeviceCapability) -> bool:
        return bool(capability >= DeviceCapability(8, 0))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A slot's stride has to be the same inside a block and from one block to the next."""
        return (KVCacheLayout.LBNHC,)

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def validate_configuration(
        cls, *args: Any, use_non_causal: bool = False, **options: Any
    ) -> list[str]:
        reasons: list[str] = super().validate_configuration(
            *args, use_non_causal=use_non_causal, **options
        )
        if not use_non_causal:
            reasons.append("it is for models of vllm_elastic, which attend both ways")
        lacking = missing()
        if lacking is not None:
            reasons.append(lacking)
        return reasons


@dataclass(slots=True)
class XFormersMetadata(AttentionMetadata):
    """What one attention call is told.

    Attributes:
        num_rows: that attend; further ones fill up.
        mask: the operator's.
    """

    num_rows: int
    mask: Any


class XFormersMetadataBuilder(AttentionMetadataBuilder[XFormersMetadata]):
    """Cuts each request's rows into pieces, and tries the operator when it is made.

    Raises:
        RuntimeError: the operator does not run here.
    """

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        model, parallel = vllm_config.model_config, vllm_config.parallel_config
        heads = model.get_num_attention_heads(parallel)
        self._block_size = kv_cache_spec.block_size
        self._group = heads // kv_cache_spec.num_kv_heads
        self._most_rows = operator().most_rows(self._group)
        # Of always the same width, a multiple of 16: else there would be several compilations.
        self._columns = -(-model.max_model_len // (self._block_size * 16)) * 16
        try:
            self._try(heads, kv_cache_spec)
        except Exception as error:
            raise RuntimeError(
                f"--attention-backend CUSTOM: xformers' kernel does not run here: {error}; leave "
                "the flag out (vllm_elastic)"
            ) from error

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> XFormersMetadata:
        """Raises:
        ValueError: the pass is causal.
        """
        common = common_attn_metadata
        if common.causal is not False:
            raise ValueError("--attention-backend CUSTOM attends both ways (vllm_elastic).")
        starts = common.query_start_loc_cpu.tolist()
        lengths = common.seq_lens_cpu_upper_bound.tolist()
        rows, owners = self._cut([b - a for a, b in pairwise(starts)])
        of_pieces = async_tensor_h2d(owners, self.device, torch.int64)
        tables = common.block_table_tensor[of_pieces]
        return XFormersMetadata(
            starts[-1], self._mask(rows, [lengths[owner] for owner in owners], tables)
        )

    def _cut(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """Rows of each piece, and which request it is of."""
        rows, owners = [], []
        for owner, count in enumerate(counts):
            for start in range(0, count, self._most_rows):
                rows.append(min(self._most_rows, count - start))
                owners.append(owner)
        return rows, owners

    def _mask(self, rows: list[int], lengths: list[int], tables: torch.Tensor) -> Any:
        padded = tables.new_zeros(len(rows), self._columns)
        padded[:, : tables.shape[1]] = tables
        return operator().make_mask(rows, lengths, padded, self._block_size, self._group)

    def _try(self, heads: int, spec: AttentionSpec) -> None:
        """One row looks at one key: compiled now, no request waits for it."""

        def zeros(*shape: int, dtype: torch.dtype = spec.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        block = zeros(1, spec.block_size, spec.num_kv_heads, 2 * spec.head_size)
        keys, values = _by_slot(block.transpose(1, 2))
        mask = self._mask([1], [1], zeros(1, 1, dtype=torch.int32))
        operator().attend(zeros(1, heads, spec.head_size), keys, values, mask, 1.0)


class XFormersImpl(AttentionImpl[XFormersMetadata]):
    """One layer's attention.

    Raises:
        NotImplementedError: anything but plain attention is asked for.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        if alibi_slopes or sliding_window or logits_soft_cap:
            raise NotImplementedError(
                "--attention-backend CUSTOM has no ALiBi, sliding windows or soft caps"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write keys and values [R, Hkv, D] to slots [R] of a cache [blocks, Hkv, N, 2 * D]."""
        keys, values = _by_slot(kv_cache)
        keys.index_copy_(0, slot_mapping, key)
        values.index_copy_(0, slot_mapping, value)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XFormersMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of queries [R, Hq, D] to the paged keys, written into ``output``.

        Args:
            key, value: not read, they are in the cache.
        """
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        keys, values = _by_slot(kv_cache)
        attended = operator().attend(query, keys, values, attn_metadata.mask, self.scale)
        own = slice(attn_metadata.num_rows)
        output.view(attended.shape)[own] = attended[own]
        return output


def _by_slot(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [slots, Hkv, D], views of a cache [blocks, Hkv, N, 2 * D].

    Raises:
        RuntimeError: blocks do not follow each other as slots in a block do.
    """
    blocks, heads, block_size, width = kv_cache.shape
    try:
        slots = kv_cache.transpose(1, 2).view(blocks * block_size, heads, width)
    except RuntimeError as error:
        raise RuntimeError(
            "--attention-backend CUSTOM needs the KV cache layout LBNHC; unset "
            "VLLM_KV_CACHE_LAYOUT (vllm_elastic)"
        ) from error
    keys, values = slots.split(width // 2, dim=-1)
    return keys, values
