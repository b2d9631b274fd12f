# SPDX-License-Identifier: Apache-2.0
"""Which tokens a grammar lets a request's next position be, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.runner.ragged import filled_up
from vllm_elastic.runner.upload import Upload


class AllowedTokens:
    """What the grammars of a pass's plans allow, put into its upload: of use once it was sent.

    Args:
        slices: each plan's rows among the window rows of the pass. A grammar binds the first one.
    """

    def __init__(
        self, plans: Sequence[PassPlan], slices: Sequence[slice], vocab_size: int, upload: Upload
    ) -> None:
        bound = [
            (window.start, plan.allowed)
            for plan, window in zip(plans, slices, strict=True)
            if plan.allowed is not None
        ]
        self._rows = [row for row, _ in bound]
        if bound:
            bits = [allowed for _, allowed in bound]
            width = max(-(-vocab_size // 32), *map(len, bits))
            self._bits = upload.put(filled_up(bits, width, np.int32))
            self._places = upload.put(np.array(self._rows, dtype=np.int64))

    def apply(self, logits: torch.Tensor, rows: slice) -> None:
        """Forbid all others, in place, in logits [R, V] of some of the window rows."""
        if not self._rows:  # most passes
            return
        first, last = np.searchsorted(self._rows, (rows.start, rows.stop)).tolist()
        if first == last:
            return
        places, bits = self._places[first:last] - rows.start, self._bits[first:last]
        token_ids = torch.arange(logits.shape[-1], device=logits.device)
        words = bits.index_select(-1, token_ids // 32)
        forbidden = (words >> (token_ids % 32).to(torch.int32)) & 1 == 0
        bound = logits.index_select(0, places).masked_fill_(forbidden, -torch.inf)
        logits.index_copy_(0, places, bound)
