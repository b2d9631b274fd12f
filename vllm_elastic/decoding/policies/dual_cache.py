# SPDX-License-Identifier: Apache-2.0
"""A fixed schedule, as Fast-dLLM's DualCache (arXiv 2505.22618): refresh once a text block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_elastic.decoding.canvas import Positions
from vllm_elastic.decoding.policies.base import RefreshPolicy

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
        start, _ = self._text_block(request)
        if start != self._refreshed_for:
            self._refreshed_for = start
            request.validity.invalidate(0)

    def window(self, request: DenoisingRequest) -> Positions:
        start, stop = self._text_block(request)
        return request.canvas.first_masked(self.config.block_length, start, stop)

    def rows(self, request: DenoisingRequest, window: Positions) -> Positions:
        return np.arange(*self._text_block(request), dtype=np.int32)

    def _text_block(self, request: DenoisingRequest) -> tuple[int, int]:
        """Positions [start, stop) of the first text block with something left to decode."""
        canvas = request.canvas
        first = int(canvas.first_masked(1)[0])
        length = self.config.block_length
        start = first - (first - canvas.prompt_length) % length
        return start, min(start + length, canvas.length)
