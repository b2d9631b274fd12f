# SPDX-License-Identifier: Apache-2.0
"""Attention statistics of a pass: kept while it runs, worked out once when it is over.

A pass overwrites keys as it goes. What the drift test needs of the state before is little: the
tested rows' old queries and the old keys of the rows that the pass writes; every other key is
still there afterwards. So nothing is computed inside the layers, and with tensor parallelism
every rank works out the partial sums of its heads, which are added up once a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from vllm_elastic.attention import attention_statistics as ops
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
from vllm_elastic.runner.attention_shape import AttentionShape
from vllm_elastic.runner.row_batch import IntArray, RowLayout
from vllm_elastic.runner.statistics.sums import StatisticSums

_NUMBERS_AT_ONCE = (1 << 26, 1 << 19)
"""Keys and attention rows that are at hand at a time, in numbers: on a GPU, on a CPU."""

_NONE: IntArray = np.empty(0, dtype=np.int64)


@dataclass(slots=True)
class _RequestRows:
    """One request's places in the saved queries and keys.

    Invariant: the window's and the tested rows join with the plan's first segment, so in the batch
    they are neighbours, and so are their saved queries.
    """

    plan: PassPlan
    queries: slice  # into the saved queries, ascending position
    in_window: npt.NDArray[np.bool_]  # of these queries
    tested: IntArray  # into these queries
    old_queries: slice  # into the saved old queries
    old_keys: slice  # into the saved old keys
    written: IntArray  # canvas positions of these keys


class StatisticsInputs:
    """What a pass has to keep, and where it keeps it.

    Attributes:
        query_rows: int64 [S] ascending, rows whose queries are kept.
        tested_positions: int64 [M], positions under test, plan by plan.
        tested_rows: int64 [M], their rows.
        old_inputs: [stored, M, d], their inputs of the layers that store them, or None: no test.
    """

    def __init__(self, plans: Sequence[PassPlan], layout: RowLayout) -> None:
        wanted = [
            i for i, plan in enumerate(plans) if plan.trackable is not None or plan.granularity
        ]
        rows = [plans[i].queries for i in wanted]
        self.query_rows: IntArray = np.sort(
            np.concatenate(
                [_NONE, *(layout.row_of[i][r] for i, r in zip(wanted, rows, strict=True))]
            )
        )
        tested, key_rows = [_NONE], [_NONE]
        self._requests: dict[int, _RequestRows] = {}
        num_tested = num_keys = 0
        for index, positions in zip(wanted, rows, strict=True):
            plan = plans[index]
            written, in_window = _NONE, np.ones(len(positions), dtype=np.bool_)
            if plan.tested.size:
                in_window = np.isin(positions, plan.window)
                written = plan.segments[0].positions.astype(np.int64)
                tested.append(plan.tested.astype(np.int64))
                key_rows.append(layout.row_of[index][written])
            first = int(np.searchsorted(self.query_rows, layout.row_of[index][positions[0]]))
            self._requests[index] = _RequestRows(
                plan=plan,
                queries=slice(first, first + len(positions)),
                in_window=in_window,
                tested=np.searchsorted(positions, plan.tested),
                old_queries=slice(num_tested, num_tested + plan.tested.size),
                old_keys=slice(num_keys, num_keys + written.size),
                written=written,
            )
            num_tested += plan.tested.size
            num_keys += written.size
        probe_rows = [layout.row_of[i][plan.probes] for i, plan in enumerate(plans)]
        self._probe_slots_np: IntArray = layout.slots[np.concatenate([_NONE, *probe_rows])]
        self.tested_positions: IntArray = np.concatenate(tested)
        self._key_rows_np: IntArray = np.concatenate(key_rows)
        self._tested_rows_np: IntArray = np.concatenate(
            [_NONE, *(layout.row_of[i][plans[i].tested] for i in wanted)]
        )
        self._plans = plans
        self._layout = layout
        self.tested_rows: torch.Tensor
        self.old_inputs: torch.Tensor | None = None

    def prepare(self, model: AttentionShape, device: torch.device, dtype: torch.dtype) -> None:
        """Read what the pass is going to overwrite, and make room for what the layers save."""

        def put(array: IntArray) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device)

        self._shape = model
        self._query_rows = put(self.query_rows)
        self._queries = torch.zeros(
            model.num_layers,
            len(self.query_rows),
            model.num_heads,
            model.head_dim,
            device=device,
            dtype=dtype,
        )
        if self._probe_slots_np.size:
            self._probe_slots = put(self._probe_slots_np)
            self._old_probes = model.hidden_rows[:, self._probe_slots]
        if self.tested_positions.size:
            # Before the pass: what the tested rows' old attention saw.
            self.tested_rows = put(self._tested_rows_np)
            tested_slots = put(self._layout.slots[self._tested_rows_np])
            self.old_inputs = ranks.gather_columns(model.hidden_rows[:, tested_slots])
            key_slots = put(self._layout.slots[self._key_rows_np])
            self._old_keys = model.key_layout.read_slots(model.key_cache, key_slots)
            # Zero in layers whose input is not stored.
            self._old_queries = self._queries.new_zeros(
                model.num_layers, len(self.tested_positions), model.num_heads, model.head_dim
            )

    def save_layer(self, layer: int, q: torch.Tensor, num_rows: int, num_queries: int) -> None:
        """Called in each layer.

        Args:
            q: [num_rows + M, Hq, D], the M tested rows' queries from stored hidden states last;
                [num_rows, Hq, D] in a layer whose input is not stored.
            num_queries: the first so many of ``query_rows`` are active at this layer.
        """
        if num_queries:
            self._queries[layer, :num_queries] = q[self._query_rows[:num_queries]]
        if self.old_inputs is not None and q.shape[0] > num_rows:
            self._old_queries[layer] = q[num_rows:]

    def partial_sums(self) -> StatisticSums:
        """What the plans' statistics add up from, of this rank's heads and columns."""
        sums = StatisticSums(self._plans, self._shape, self._queries.device)
        for layers, alike in self._alike():
            self._add_attention(sums, alike, layers)
        if self._probe_slots_np.size:
            sums.add_probes(*self._probe_sums())
        return sums

    def _alike(self) -> Iterator[tuple[range, list[int]]]:
        """Layers, and the plans whose attention is read in these.

        A plan that tests stays alone: it reads every layer, and no two have as many rows.
        """
        last, alike = self._shape.num_layers - 1, dict[range, list[int]]()
        for index, rows in self._requests.items():
            plan = rows.plan
            # From the start layer on, counted down from the last.
            start = plan.start_layer + (last - plan.start_layer) % plan.attention_stride
            layers = range(start, last + 1, plan.attention_stride)
            if plan.tested.size:
                yield layers, [index]
            else:
                alike.setdefault(layers, []).append(index)
        yield from alike.items()

    def _add_attention(self, sums: StatisticSums, indices: list[int], layers: range) -> None:
        """Work out these plans' attention in these layers and add it to the sums.

        As many plans and layers at a time as a CPU's cache, or a GPU's spare memory, has room for.
        """
        room = _NUMBERS_AT_ONCE[self._queries.device.type == "cpu"]
        room //= max(map(self._attention_numbers, indices))
        num_plans, num_layers = max(1, room // len(layers)), max(1, room)
        # Neighbours in length: the shorter ones are filled up.
        indices = sorted(indices, key=lambda index: len(self._requests[index].plan.tokens))
        for first in range(0, len(indices), num_plans):
            some = indices[first : first + num_plans]
            parts = [
                self._sums_of_layers(some, layers[i : i + num_layers])
                for i in range(0, len(layers), num_layers)
            ]
            mass, *drift = (torch.cat(part) for part in zip(*parts, strict=True))
            sums.add_mass(some, layers, mass)
            if drift:  # of a plan that is alone
                num_tested = self._shape.num_tested(self._requests[some[0]].plan.tested_layers)
                sums.add_drift(some[0], [part[:num_tested] for part in drift])

    def _attention_numbers(self, index: int) -> int:
        """Numbers of a layer that are at hand at once: keys, or attention rows if they are more."""
        shape, rows = self._shape, self._requests[index]
        num_rows = len(rows.in_window) + rows.plan.tested.size
        keys = shape.num_kv_heads * shape.head_dim
        return len(rows.plan.tokens) * max(keys, shape.num_heads * num_rows)

    def _sums_of_layers(self, indices: list[int], layers: range) -> list[torch.Tensor]:
        """Mass [layers, plans, longest T] and, of a plan that tests, ``ops.drift_sums``."""
        shape = self._shape
        attention = self._attention(indices, layers)
        num_new = max(len(self._requests[index].in_window) for index in indices)
        in_window = np.zeros((len(indices), num_new), dtype=np.float32)
        for nth, index in enumerate(indices):
            flags = self._requests[index].in_window
            in_window[nth, : len(flags)] = flags
        weights = torch.from_numpy(in_window).to(attention.device)
        sums = [ops.attention_mass(attention[..., :num_new, :], weights)]
        rows = self._requests[indices[0]]
        if rows.plan.tested.size:
            # Tested are the layers whose input is stored.
            compared = attention[-layers.start % shape.hidden_stride :: shape.hidden_stride, 0]
            tested = torch.from_numpy(rows.tested).to(attention.device)
            sums += ops.drift_sums(
                compared[:, :, num_new:], compared[:, :, tested], rows.plan.statistic
            )
        return sums

    def _attention(self, indices: list[int], layers: range) -> torch.Tensor:
        """float32 [layers, plans, H, rows, T]: attention rows of saved queries, after the pass.

        Rows and T are those of the plan with the most; attention to what is beyond a plan's own T
        is 0, and rows beyond its own mean nothing. Behind the rows of a plan that tests are the
        tested ones', as they were before the pass: by their old queries, and with the keys that
        the pass overwrote. They mean nothing in a layer whose input is not stored.
        """
        shape, requests = self._shape, [self._requests[index] for index in indices]
        lengths = np.array([len(rows.plan.tokens) for rows in requests])
        span = slice(layers.start, layers.stop, layers.step)
        blocks = [rows.plan.block_ids for rows in requests]
        keys = shape.key_layout.read_blocks(shape.key_cache[span], blocks)[..., : lengths.max()]
        places = np.zeros((len(requests), max(len(r.in_window) for r in requests)), dtype=np.int64)
        for row, rows in zip(places, requests, strict=True):
            # Filled up with a row of its own: another request's may not be a number.
            row[:] = rows.queries.start
            row[: len(rows.in_window)] = range(rows.queries.start, rows.queries.stop)
        queries = self._queries[span][:, torch.from_numpy(places).to(keys.device)]
        rows = requests[0]
        if rows.plan.tested.size:
            old_queries = self._old_queries[span, None, rows.old_queries]
            scores = ops.attention_scores(torch.cat([queries, old_queries], 2), keys, shape.scale)
            written = torch.from_numpy(rows.written).to(scores.device)
            old_keys = self._old_keys[span, None, rows.old_keys].permute(0, 1, 3, 4, 2)
            scores[..., queries.shape[2] :, written] = ops.attention_scores(
                old_queries, old_keys, shape.scale
            )
        else:
            scores = ops.attention_scores(queries, keys, shape.scale)
        if lengths.min() < lengths.max():
            beyond = torch.from_numpy(np.arange(lengths.min(), lengths.max()) >= lengths[:, None])
            tails = scores[..., lengths.min() :]
            tails.masked_fill_(beyond[:, None, None].to(scores.device), -torch.inf)
        return scores.softmax(dim=-1)

    def _probe_sums(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared norms of the change of stored hidden states, and of them: [stored, probes]."""
        old = self._old_probes.float()
        new = self._shape.hidden_rows[:, self._probe_slots].float()
        # The square of a rounded norm has that norm for its root: one rank's numbers are unchanged.
        return (new - old).norm(dim=-1).square(), old.norm(dim=-1).square()
