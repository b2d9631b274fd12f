# SPDX-License-Identifier: Apache-2.0
"""Warm-up passes at start on a GPU: what is made at a kernel's first call is made by them.

vLLM's attention is compiled when it is called on some cards: FlashAttention 4 on Blackwell, Triton
in float32. How often depends on a batch: one row of a request or more (Triton), more than a tile of
128, a canvas whose keys are split among programs or not (FlashAttention), one request, several, or
a multiple of 16 (Triton).
"""

from __future__ import annotations

from itertools import product

import numpy as np

from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment
from vllm_elastic.decoding.traits import DecodingTraits

_SHORT, _MANY_ROWS = 32, 192
"""Positions of a canvas whose keys are not split; rows that fill more than a tile."""


def warm_up_passes(
    traits: DecodingTraits, canvas: int, row_budget: int, block_size: int
) -> list[list[PassPlan]]:
    """Their plans: windows of canvases that lie in vLLM's null block, which no request owns.

    Args:
        canvas: positions of the longest one; block_size: positions a KV block.
    """

    def plan(length: int, num_rows: int) -> PassPlan:
        window = np.arange(num_rows, dtype=np.int32)
        return PassPlan(
            request_id="",
            kind=PassKind.WINDOW,
            denoising_step=0,
            segments=[Segment(0, window)],
            tokens=np.full(length, traits.mask_token_id, dtype=np.int32),
            window=window,
            num_written=length,
            block_ids=np.zeros(-(-length // block_size), dtype=np.int32),
        )

    lengths = sorted({min(_SHORT, canvas), canvas})
    counts = (1, 2, min(_MANY_ROWS, row_budget // 2))
    plans = [
        plan(length, min(length, count)) for length, count in product(lengths, counts) if count
    ]
    return [
        [warming] * requests
        for warming in plans
        for requests in (1, 2, 16)
        if requests * warming.num_rows <= row_budget
    ]
