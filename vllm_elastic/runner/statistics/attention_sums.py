# SPDX-License-Identifier: Apache-2.0
"""Who works out attention once a pass is over: Triton's kernels on CUDA, torch elsewhere."""

from __future__ import annotations

from typing import Protocol

from vllm_elastic.models import ranks
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import SavedRows
from vllm_elastic.runner.statistics.torch_sums import TorchSums
from vllm_elastic.runner.upload import Upload


class AttentionSums(Protocol):
    """Works out the attention of one pass. Made before the upload is sent.

    Attributes:
        read_layers: those whose attention is going to be read.
    """

    read_layers: set[int]

    def add_to_totals(self, recorder: PassRecorder) -> None:
        """Once the pass is over, on every rank: its heads' attention, and what drift sums up."""
        ...


def attention_sums(
    saved: SavedRows, cache: CacheView, drift: DriftTotals, blocks: BlockTotals, upload: Upload
) -> AttentionSums:
    """The one that the device takes. Both give the same numbers, but for rounding."""
    if cache.keys.is_cuda:
        # Triton need not be there elsewhere.
        from vllm_elastic.runner.statistics.kernel_sums import KernelSums

        return KernelSums(saved, cache, drift, blocks, upload)
    return TorchSums(saved, cache, drift, blocks, upload)


def warm_up(cache: CacheView) -> None:
    """Compile what passes will launch."""
    if cache.keys.is_cuda:
        from vllm_elastic.attention import paged_statistics

        keys = paged_statistics.PagedKeys(cache.keys, cache.key_layout)
        of_all_ranks = cache.num_heads * ranks.count()
        paged_statistics.warm_up(keys, cache.num_heads, of_all_ranks, cache.hidden_stride)
