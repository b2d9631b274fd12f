# SPDX-License-Identifier: Apache-2.0
"""The tensor-parallel ranks of this pass: which part is whose, and how parts become a whole.

Knows nothing of what the parts are. With one rank nothing is copied and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.distributed.parallel_state import graph_capture


def count() -> int:
    """How many ranks share a layer's heads."""
    return int(get_tensor_model_parallel_world_size())


def reports() -> bool:
    """Whether this rank's results are the ones that reach the scheduler."""
    return bool(get_tensor_model_parallel_rank() == 0)


def capturing(device: torch.device) -> AbstractContextManager[Any]:
    """Is entered around captures of graphs in which ranks add up, on all ranks the same ones: where
    each other's parts are they tell when it is left."""
    return nullcontext() if count() == 1 else graph_capture(device)


def own_columns(rows: torch.Tensor) -> torch.Tensor:
    """This rank's columns [..., d / ranks] of rows [..., d], a view; d a multiple of the ranks."""
    if count() == 1:
        return rows
    width = rows.shape[-1] // count()
    return rows.narrow(-1, get_tensor_model_parallel_rank() * width, width)


def gather_columns(columns: torch.Tensor) -> torch.Tensor:
    """Rows [..., d] on all ranks from each rank's columns [..., d / ranks]: one all-gather."""
    if count() == 1:
        return columns
    return tensor_model_parallel_all_gather(columns.contiguous(), dim=-1)


def add_up(parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each of the float32 tensors summed over all ranks: one all-reduce for all of them.

    Every rank gives the same shapes in the same order.
    """
    if count() == 1 or not parts:
        return list(parts)
    flat = tensor_model_parallel_all_reduce(torch.cat([part.flatten() for part in parts]))
    sums = flat.split([part.numel() for part in parts])
    return [total.view(part.shape) for total, part in zip(sums, parts, strict=True)]


def add_up_in_place(parts: Sequence[torch.Tensor]) -> None:
    """``add_up``, with each sum in its tensor's place."""
    if count() > 1:
        for part, total in zip(parts, add_up(parts), strict=True):
            part.copy_(total)
