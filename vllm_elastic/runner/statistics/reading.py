# SPDX-License-Identifier: Apache-2.0
"""Which queries' attention is worked out together: decided, and uploaded, before the pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_elastic.runner.cache_view import CacheView
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.statistics import memory
from vllm_elastic.runner.statistics.saved_rows import OwnRows
from vllm_elastic.runner.upload import Upload


@dataclass(slots=True)
class QueryTile:
    """Some rows of each plan of a reading.

    Attributes:
        places: int64 [plans, rows], into the saved queries; filled up with a row of the plan's own.
        weights: float32 [plans, rows], 1 for the window's rows, 0 for others and for filling.
    """

    owners: list[OwnRows]
    places: torch.Tensor
    weights: torch.Tensor


@dataclass(slots=True)
class Reading:
    """Plans of one kind whose attention is read in the same layers.

    Attributes:
        indices: of the plans; more than one only where nothing is tested.
        places: int64 [plans], theirs among all plans of the kind.
        layers_at_once: of these layers, so many are worked on together.
        tiles: more than one only of a plan that is alone, whose rows are too many at once.
        blocks: the kernels' blocks of each plan; table: the same, int64 [plans, most blocks].
        lengths: T of each plan, ascending.
        beyond: bool [plans, longest T - shortest T], positions that a plan does not have; None:
            all have the same.
    """

    indices: list[int]
    places: torch.Tensor
    layers: range
    layers_at_once: int
    tiles: list[QueryTile]
    blocks: list[Sequence[int]]
    table: torch.Tensor
    lengths: list[int]
    beyond: torch.Tensor | None

    def layer_parts(self) -> Iterator[range]:
        """The layers, as many at a time as there is room for."""
        for first in range(0, len(self.layers), self.layers_at_once):
            yield self.layers[first : first + self.layers_at_once]


class ReadingPlanner:
    """Puts plans together, as many as a CPU's cache has room for.

    Args:
        numbers_at_once: keys and attention rows that may be at hand at a time.
    """

    def __init__(
        self, owners: dict[int, OwnRows], cache: CacheView, upload: Upload, numbers_at_once: int
    ) -> None:
        self._owners, self._cache, self._upload = owners, cache, upload
        self._numbers_at_once = numbers_at_once
        counts: Counter[type] = Counter()
        self._nth: dict[int, int] = {}
        for index, own in owners.items():
            self._nth[index] = counts[type(own.measure)]
            counts[type(own.measure)] += 1

    def readings(self) -> list[Reading]:
        """Every plan once, in every layer that it looks at."""
        return [
            reading
            for layers, group in self._groups()
            for reading in self._readings_of(group, layers)
        ]

    def _groups(self) -> Iterator[tuple[range, list[int]]]:
        """Layers, and the plans of one kind whose attention is read in these.

        A plan that tests stays alone: it reads every layer, and no two have as many rows.
        """
        alike: dict[tuple[type, range], list[int]] = {}
        for index, own in self._owners.items():
            layers = own.layers(self._cache.num_layers)
            if own.tested.size:
                yield layers, [index]
            else:
                alike.setdefault((type(own.measure), layers), []).append(index)
        for (_, layers), indices in alike.items():
            yield layers, indices

    def _readings_of(self, indices: list[int], layers: range) -> Iterator[Reading]:
        tiles = {index: self._cut(self._owners[index]) for index in indices}
        most = max(self._numbers(own) for owns in tiles.values() for own in owns)
        at_once = max(1, self._numbers_at_once // most)
        # A plan in several tiles leaves no room for another one.
        num_plans = max(1, at_once // len(layers))
        # Neighbours in length: the shorter ones are filled up.
        indices = sorted(indices, key=lambda index: len(self._owners[index].plan.tokens))
        for first in range(0, len(indices), num_plans):
            read = indices[first : first + num_plans]
            together = zip(*(tiles[index] for index in read), strict=True)
            yield self._reading(read, layers, at_once, [list(owners) for owners in together])

    def _reading(
        self, indices: list[int], layers: range, at_once: int, tiles: list[list[OwnRows]]
    ) -> Reading:
        plans = [self._owners[index].plan for index in indices]
        blocks = [self._cache.kernel_blocks(plan.block_ids) for plan in plans]
        table = filled_up(blocks, max(map(len, blocks)), np.int64)
        lengths = [len(plan.tokens) for plan in plans]
        beyond = None
        if lengths[0] < lengths[-1]:
            columns = np.arange(lengths[0], lengths[-1])
            beyond = self._upload.put(columns >= np.array(lengths)[:, None])
        return Reading(
            indices=indices,
            places=self._upload.put(np.array([self._nth[index] for index in indices])),
            layers=layers,
            layers_at_once=at_once,
            tiles=[self._tile(owners) for owners in tiles],
            blocks=[of_plan.tolist() for of_plan in blocks],
            table=self._upload.put(table),
            lengths=lengths,
            beyond=beyond,
        )

    def _tile(self, owners: list[OwnRows]) -> QueryTile:
        shape = len(owners), max(len(own.in_window) for own in owners)
        places, weights = np.empty(shape, dtype=np.int64), np.zeros(shape, dtype=np.float32)
        for place, weight, own in zip(places, weights, owners, strict=True):
            place[:] = own.queries.start  # another plan's may not be a number
            place[: len(own.in_window)] = np.arange(own.queries.start, own.queries.stop)
            weight[: len(own.in_window)] = own.in_window
        return QueryTile(owners, self._upload.put(places), self._upload.put(weights))

    def _cut(self, own: OwnRows) -> list[OwnRows]:
        """A plan by as many queries as keep a layer's attention within the bound of memory."""
        # A tested row has its attention before the pass behind it.
        of_row = len(own.plan.tokens) * self._cache.num_heads * (2 if own.tested.size else 1)
        return own.tiles(max(1, memory.MOST_NUMBERS_AT_ONCE // of_row))

    def _numbers(self, own: OwnRows) -> int:
        """Numbers of a layer that are needed at once: keys, or attention rows if they are more."""
        cache = self._cache
        num_rows = len(own.in_window) + own.tested.size
        keys = cache.num_kv_heads * cache.head_dim
        return len(own.plan.tokens) * max(keys, cache.num_heads * num_rows)
