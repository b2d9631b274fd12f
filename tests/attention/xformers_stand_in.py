# SPDX-License-Identifier: Apache-2.0
"""``paged_xformers`` in plain torch, for machines without xformers: one piece after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

MOST_QUERIES = 6
"""Few, so that the engine's small passes are cut."""


@dataclass
class Mask:
    rows: list[int]
    lengths: list[int]
    tables: torch.Tensor
    page_size: int


def most_rows(group: int) -> int:
    return max(2, MOST_QUERIES // group)


def make_mask(
    rows: Sequence[int], lengths: Sequence[int], tables: torch.Tensor, page_size: int, group: int
) -> Mask:
    assert len(rows) == len(lengths) == len(tables)
    assert min(rows) > 0 and max(rows) <= most_rows(group)
    assert tables.dtype == torch.int32 and max(lengths) <= tables.shape[1] * page_size
    return Mask(list(rows), list(lengths), tables, page_size)


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Mask, scale: float
) -> torch.Tensor:
    out = torch.full_like(queries, float("nan"))
    group = queries.shape[1] // keys.shape[1]
    places = torch.arange(mask.page_size)
    stops = accumulate(mask.rows)
    for stop, rows, length, table in zip(stops, mask.rows, mask.lengths, mask.tables, strict=True):
        own = slice(stop - rows, stop)
        slots = (table[:, None] * mask.page_size + places).flatten()[:length]
        k, v = (each[slots].repeat_interleave(group, dim=1).float() for each in (keys, values))
        scores = torch.einsum("rhd,thd->hrt", queries[own].float(), k) * scale
        attended = torch.einsum("hrt,thd->rhd", scores.softmax(dim=-1), v)
        out[own] = attended.to(queries.dtype)
    return out
