# SPDX-License-Identifier: Apache-2.0
"""What a pass keeps while it runs: queries, and what it is going to overwrite.

A pass overwrites keys as it goes. What the drift test needs of the state before is little: the
tested rows' old queries and the old keys of the rows that the pass writes; every other key is
still there afterwards. So nothing is computed inside the layers.
"""

from __future__ import annotations

import torch

from vllm_elastic.models import ranks
from vllm_elastic.models.rows import LayerRows
from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.statistics.saved_rows import SavedRows


class PassRecorder:
    """Made before a pass, filled by it (``models.rows.Recorder``).

    Attributes:
        queries: [L, S, Hq, D], 0 in layers in which a row is not active.
        old_queries: [L, M, Hq, D] of tested rows, 0 in layers whose input is not stored; None:
            nothing is tested.
        old_keys: [L, K, Hkv, D]; old_probes: [stored, probes, d / ranks]; None: none are wanted.
    """

    def __init__(self, saved: SavedRows, cache: CacheView, dtype: torch.dtype) -> None:
        self._query_rows = saved.queries_on_device
        self.tested_rows = saved.tested_on_device
        shape = cache.num_layers, -1, cache.num_heads, cache.head_dim
        self.queries = self._zeros(shape, len(saved.query_rows), dtype)
        self.old_inputs: torch.Tensor | None = None
        self.old_queries: torch.Tensor | None = None
        self.old_keys: torch.Tensor | None = None
        self.old_probes: torch.Tensor | None = None
        if saved.num_probes:
            self.old_probes = cache.hidden[:, saved.probe_slots]
        if len(saved.tested_positions):
            self.old_inputs = ranks.gather_columns(cache.hidden[:, saved.tested_slots])
            self.old_keys = cache.key_layout.read_slots(cache.keys, saved.old_key_slots)
            self.old_queries = self._zeros(shape, len(saved.tested_positions), dtype)

    def _zeros(
        self, shape: tuple[int, int, int, int], count: int, dtype: torch.dtype
    ) -> torch.Tensor:
        layers, _, heads, dim = shape
        return torch.zeros(layers, count, heads, dim, dtype=dtype, device=self._query_rows.device)

    def save_queries(self, layer: int, rows: LayerRows, q: torch.Tensor) -> None:
        count = rows.num_queries
        if count:
            self.queries[layer, :count] = q[self._query_rows[:count]]
        # A layer whose input is not stored projects the active rows only.
        if self.old_queries is not None and len(q) == len(rows.positions):
            first = rows.num_rows
            self.old_queries[layer] = q[first : first + self.old_queries.shape[1]]
