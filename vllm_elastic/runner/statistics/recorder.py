# SPDX-License-Identifier: Apache-2.0
"""What a pass keeps while it runs: queries, and what it is going to overwrite.

A pass overwrites keys as it goes. What the drift test needs of the state before is little: the
tested rows' old queries and the old keys of the rows that the pass writes; every other key is
still there afterwards. So nothing is computed inside the layers.
"""

from __future__ import annotations

from collections.abc import Set

import torch

from vllm_elastic.models import ranks
from vllm_elastic.models.rows import LayerRows
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics.saved_rows import SavedRows


class PassRecorder:
    """Made before a pass, filled by it (``models.rows.Recorder``).

    Attributes:
        read_layers: those whose attention is going to be read.
        queries: [L, S, Hq, D]; of no meaning in layers that are not read, nor where a row is not
            active.
        old_queries: [L, M, Hq, D] of tested rows, 0 in layers whose input is not stored; None:
            nothing is tested.
        old_keys: [L, K, Hkv, D]; old_probes: [stored, probes, d / ranks]; None: none are wanted.
    """

    def __init__(
        self, saved: SavedRows, cache: CacheView, dtype: torch.dtype, read_layers: Set[int]
    ) -> None:
        self.read_layers: Set[int] = read_layers
        self._query_rows = saved.queries_on_device
        self.tested_rows = saved.tested_on_device
        num_queries, num_tested = len(saved.query_rows), len(saved.tested_positions)
        layers, heads, dim = cache.num_layers, cache.num_heads, cache.head_dim
        self.queries = cache.keys.new_empty(layers, num_queries, heads, dim, dtype=dtype)
        self.old_inputs: torch.Tensor | None = None
        self.old_queries: torch.Tensor | None = None
        self.old_keys: torch.Tensor | None = None
        self.old_probes: torch.Tensor | None = None
        if saved.num_probes:
            self.old_probes = cache.hidden[:, saved.probe_slots]
        if num_tested:
            self.old_inputs = ranks.gather_columns(cache.hidden[:, saved.tested_slots])
            self.old_keys = cache.key_layout.read_slots(cache.keys, saved.old_key_slots)
            self.old_queries = cache.keys.new_zeros(layers, num_tested, heads, dim, dtype=dtype)

    def save_queries(self, layer: int, rows: LayerRows, q: torch.Tensor) -> None:
        if layer not in self.read_layers:
            return
        count = rows.num_queries
        if count:
            kept = self.queries[layer, :count]
            torch.index_select(q, 0, self._query_rows[:count], out=kept)
        # A layer whose input is not stored projects the active rows only.
        if self.old_queries is not None and len(q) == len(rows.positions):
            first = rows.num_rows
            self.old_queries[layer] = q[first : first + self.old_queries.shape[1]]
