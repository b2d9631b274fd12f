# SPDX-License-Identifier: Apache-2.0
"""Attention of saved queries, worked out once more when a pass is over."""

from __future__ import annotations

import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.measurement import DriftTest
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics.reading import QueryTile, Reading
from vllm_elastic.runner.statistics.recorder import PassRecorder
from vllm_elastic.runner.statistics.saved_rows import OwnRows


class AttentionReader:
    """Attention rows of some plans in some layers, from the recorder and the paged keys."""

    def __init__(self, cache: CacheView, recorder: PassRecorder) -> None:
        self._cache, self._recorder = cache, recorder

    def sums(self, reading: Reading, tile: QueryTile, layers: range) -> list[torch.Tensor]:
        """What adds up over heads and ranks.

        Args:
            layers: some of the reading's.

        Returns:
            the windows' attention mass [layers, plans, longest T], and behind it, of a plan that
            tests, ``ops.drift_sums`` of the layers whose input is stored.
        """
        attention = self._attention(reading, tile, layers)
        num_new = tile.places.shape[1]
        sums = [ops.attention_mass(attention[..., :num_new, :], tile.weights)]
        own = tile.owners[0]
        if own.tested.size:
            assert isinstance(own.measure, DriftTest)
            stride = self._cache.hidden_stride
            compared = attention[-layers.start % stride :: stride, 0]
            old, new = compared[:, :, num_new:], compared[:, :, own.tested_on_device]
            sums += ops.drift_sums(old, new, own.measure.statistic)
        return sums

    def _attention(self, reading: Reading, tile: QueryTile, layers: range) -> torch.Tensor:
        """float32 [layers, plans, H, rows, T]: attention rows of saved queries, after the pass.

        Rows and T are those of the plan with the most; attention to what is beyond a plan's own T
        is 0, and rows beyond its own mean nothing. Behind the rows of a plan that tests are the
        tested ones', as they were before the pass: by their old queries, and with the keys that
        the pass overwrote. They mean nothing in a layer whose input is not stored.
        """
        cache, span = self._cache, slice(layers.start, layers.stop, layers.step)
        keys = cache.key_layout.read_blocks(cache.keys[span], reading.blocks, reading.table)
        keys = keys[..., : reading.lengths[-1]]
        queries = self._recorder.queries[span][:, tile.places]
        if tile.owners[0].tested.size:
            scores = self._scores_before_and_after(tile.owners[0], span, queries, keys)
        else:
            scores = ops.attention_scores(queries, keys, cache.scale)
        if reading.beyond is not None:
            tails = scores[..., reading.lengths[0] :]
            tails.masked_fill_(reading.beyond[:, None, None], -torch.inf)
        return scores.softmax(dim=-1)

    def _scores_before_and_after(
        self, own: OwnRows, span: slice, queries: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        """Scores of a plan's queries, and behind them of its old queries with the old keys."""
        recorder, scale = self._recorder, self._cache.scale
        assert recorder.old_queries is not None and recorder.old_keys is not None
        old_queries = recorder.old_queries[span, None, own.old_queries]
        old_keys = recorder.old_keys[span, None, own.old_keys].permute(0, 1, 3, 4, 2)
        scores = ops.attention_scores(torch.cat([queries, old_queries], 2), keys, scale)
        overwritten = ops.attention_scores(old_queries, old_keys, scale)
        scores[..., queries.shape[2] :, own.written_on_device] = overwritten
        return scores
