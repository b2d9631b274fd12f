# SPDX-License-Identifier: Apache-2.0
"""Attention of saved queries, worked out once more when a pass is over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics import memory
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import OwnRows


class AttentionReader:
    """Attention rows of some plans in some layers, from the recorder and the paged keys."""

    def __init__(self, cache: CacheView, recorder: PassRecorder) -> None:
        self._cache, self._recorder = cache, recorder

    def sums(self, owners: Sequence[OwnRows], layers: range) -> list[torch.Tensor]:
        """What adds up over heads and ranks.

        Args:
            owners: one plan that tests, or any number that test nothing.

        Returns:
            the windows' attention mass [layers, plans, longest T], and behind it, of a plan that
            tests, ``ops.drift_sums`` of the layers whose input is stored.
        """
        attention = self._attention(owners, layers)
        num_new = max(len(own.in_window) for own in owners)
        sums = [ops.attention_mass(attention[..., :num_new, :], self._weights(owners, num_new))]
        own = owners[0]
        if own.tested.size:
            assert isinstance(own.measure, DriftTest)
            stride = self._cache.hidden_stride
            compared = attention[-layers.start % stride :: stride, 0]
            old, new = compared[:, :, num_new:], compared[:, :, own.tested_on_device]
            sums += ops.drift_sums(old, new, own.measure.statistic)
        return sums

    def rows_at_once(self, own: OwnRows) -> int:
        """Queries of a plan of which one layer's attention is within ``NUMBERS_AT_ONCE_ON_GPU``."""
        # A tested row has its attention before the pass behind it.
        each = len(own.plan.tokens) * self._cache.num_heads * (2 if own.tested.size else 1)
        return max(1, memory.NUMBERS_AT_ONCE_ON_GPU // each)

    def numbers_at_hand(self, own: OwnRows) -> int:
        """Numbers of a layer that are needed at once: keys, or attention rows if they are more."""
        cache = self._cache
        num_rows = len(own.in_window) + own.tested.size
        keys = cache.num_kv_heads * cache.head_dim
        return len(own.plan.tokens) * max(keys, cache.num_heads * num_rows)

    def _weights(self, owners: Sequence[OwnRows], num_new: int) -> torch.Tensor:
        """float32 [plans, rows]: 1 for the window's rows, 0 for others and for filling."""
        weights = np.zeros((len(owners), num_new), dtype=np.float32)
        for row, own in zip(weights, owners, strict=True):
            row[: len(own.in_window)] = own.in_window
        return torch.from_numpy(weights).to(self._recorder.queries.device)

    def _attention(self, owners: Sequence[OwnRows], layers: range) -> torch.Tensor:
        """float32 [layers, plans, H, rows, T]: attention rows of saved queries, after the pass.

        Rows and T are those of the plan with the most; attention to what is beyond a plan's own T
        is 0, and rows beyond its own mean nothing. Behind the rows of a plan that tests are the
        tested ones', as they were before the pass: by their old queries, and with the keys that
        the pass overwrote. They mean nothing in a layer whose input is not stored.
        """
        cache, lengths = self._cache, [len(own.plan.tokens) for own in owners]
        blocks = [cache.kernel_blocks(own.plan.block_ids) for own in owners]
        keys = cache.key_layout.read_blocks(cache.keys[_slice(layers)], blocks)
        keys = keys[..., : max(lengths)]
        queries = self._queries(owners, layers)
        if owners[0].tested.size:
            scores = self._scores_before_and_after(owners[0], layers, queries, keys)
        else:
            scores = ops.attention_scores(queries, keys, cache.scale)
        if min(lengths) < max(lengths):
            _mask_beyond(scores, lengths)
        return scores.softmax(dim=-1)

    def _queries(self, owners: Sequence[OwnRows], layers: range) -> torch.Tensor:
        """[layers, plans, rows, Hq, D]; filled up with a row of the plan's own."""
        places = np.empty((len(owners), max(len(own.in_window) for own in owners)), dtype=np.int64)
        for row, own in zip(places, owners, strict=True):
            row[:] = own.queries.start  # another plan's may not be a number
            row[: len(own.in_window)] = range(own.queries.start, own.queries.stop)
        queries = self._recorder.queries
        return queries[_slice(layers)][:, torch.from_numpy(places).to(queries.device)]

    def _scores_before_and_after(
        self, own: OwnRows, layers: range, queries: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Scores of a plan's queries, and behind them of its old queries with the old keys."""
        recorder, scale = self._recorder, self._cache.scale
        assert recorder.old_queries is not None and recorder.old_keys is not None
        old_queries = recorder.old_queries[_slice(layers), None, own.old_queries]
        old_keys = recorder.old_keys[_slice(layers), None, own.old_keys].permute(0, 1, 3, 4, 2)
        scores = ops.attention_scores(torch.cat([queries, old_queries], 2), keys, scale)
        overwritten = ops.attention_scores(old_queries, old_keys, scale)
        scores[..., queries.shape[2] :, own.written_on_device] = overwritten
        return scores


def _slice(layers: range) -> slice:
    return slice(layers.start, layers.stop, layers.step)


def _mask_beyond(scores: torch.Tensor, lengths: Sequence[int]) -> None:
    """-inf at positions [..., plans, H, rows, T] beyond each plan's own length, in place."""
    shortest, longest = min(lengths), max(lengths)
    beyond = np.arange(shortest, longest) >= np.array(lengths)[:, None]
    mask = torch.from_numpy(beyond).to(scores.device)
    scores[..., shortest:].masked_fill_(mask[:, None, None], -torch.inf)
