# SPDX-License-Identifier: Apache-2.0
"""Attention to paged keys and values by xformers' split-k kernel: the one module that imports it.

Written for xformers 0.0.35 (``xformers/ops/fmha/triton_splitk.py``). Beside that it wants Triton
alone: xformers' compiled extensions need not fit the installed torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from xformers.ops.fmha.attn_bias import PagedBlockDiagonalPaddedKeysMask
from xformers.ops.fmha.common import Inputs
from xformers.ops.fmha.triton_splitk import FwOp

_ROWS = 64
"""Queries of a program, those of all heads that share a KV head."""

_ANY = 1 << 30
_UNREAD: dict[str, int] = dict(
    Z=1,
    N_CTX_Q=1,
    N_CTX_K=_ANY,
    NUM_QUERIES_CAUSAL=1,
    BLOCK_N_PER_SPLIT=_ANY,
    kv_cache_blocks_per_row=1,
)
"""Constants that the kernel is compiled for, and does not read where keys are paged, not causal and
not split. xformers gives them a pass's own numbers: nearly each pass would wait for a compiler."""


def most_rows(group: int) -> int:
    """Into pieces of how many rows a request's rows are cut: one program has a KV head of each.

    xformers starts as many programs for every piece as the longest one needs, and each looks at
    all keys: without a cut, a canvas would multiply the work of every window beside it.

    Args:
        group: query heads for each KV head.
    """
    return max(2, _ROWS // group)  # of 1, the operator would take the rows for a batch


def make_mask(
    rows: Sequence[int], lengths: Sequence[int], tables: torch.Tensor, page_size: int, group: int
) -> PagedBlockDiagonalPaddedKeysMask:
    """Which keys the rows of each piece attend to: all of its canvas.

    Args:
        rows: of each piece, at most ``most_rows``; pieces stand one behind the other.
        lengths: T of each piece's canvas.
        tables: int32 [pieces, columns], the blocks of each piece's canvas.
    """
    mask = PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        rows, lengths, tables, page_size, device=tables.device
    )
    # As if one were as long as may be, so that rows never count as a batch.
    mask.q_seqinfo.max_seqlen = most_rows(group)
    return mask


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: PagedBlockDiagonalPaddedKeysMask,
    scale: float,
) -> torch.Tensor:
    """Attention output [R, Hq, D] of queries [R, Hq, D]; rows of no piece are undefined.

    Args:
        keys, values: [slots, Hkv, D], a page's slots one behind the other; any strides but the
            last one's, which is 1.
    """
    num_rows, heads, dim = queries.shape
    group = heads // keys.shape[1]
    shape = (1, len(keys), keys.shape[1], group, dim)
    inputs = Inputs(
        queries.view(1, num_rows, -1, group, dim),
        keys[None, :, :, None].expand(shape),
        values[None, :, :, None].expand(shape),
        mask,
        scale=scale,
    )
    # Not by `memory_efficient_attention_forward`: it asks once a layer what is known at start.
    attended, _ = _OneSplit.apply(inputs, needs_gradient=False)
    return attended.view(num_rows, heads, dim)


class _OneSplit(FwOp):
    """Keys are not split: where they were cut, and so the rounding, would depend on the batch."""

    SPLIT_K = 1

    @classmethod
    def get_kernel(cls) -> _ForAnyPass:
        return _ForAnyPass(super().get_kernel())

    @classmethod
    def get_extra_args(cls, *, attn_bias: Any, **_: Any) -> dict[str, int]:
        """What xformers takes for 64 rows of head size 128 on newer cards, but for the keys."""
        keys = next(size for size in (64, 32, 16) if attn_bias.page_size % size == 0)
        return dict(BLOCK_M=_ROWS, BLOCK_N=keys, num_warps=4, num_stages=1)


class _ForAnyPass:
    """The kernel, compiled once for all passes."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        launch = self._kernel[grid]
        return lambda **arguments: launch(**arguments | _UNREAD)
