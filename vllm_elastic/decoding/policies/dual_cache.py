# SPDX-License-Identifier: Apache-2.0
"""A fixed schedule, as Fast-dLLM's DualCache (arXiv 2505.22618): refresh once a text block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_elastic.decoding.canvas import Positions
from vllm_elastic.decoding.policies.base import RefreshPolicy
from vllm_elastic.decoding.schedule import text_block

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest


class DualCache(RefreshPolicy):
    """Text blocks of ``block_length`` new tokens, decoded one after the other.

    The first step of a block recomputes the whole canvas; every other step recomputes all of the
    block's positions and reuses the keys and values before and after it.
    """

    name = "dual-cache"

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self._refreshed_for = -1

    def begin_step(self, request: DenoisingRequest) -> None:
        start, _ = text_block(request.canvas, self.config.block_length)
        if start != self._refreshed_for:
            self._refreshed_for = start
            request.validity.invalidate(0)

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        start, stop = text_block(request.canvas, self.config.block_length)
        # With shifted logits the block's first position is predicted by the row before it.
        return np.arange(start - request.traits.logits_shift, stop, dtype=np.int32)
