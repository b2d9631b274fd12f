# SPDX-License-Identifier: Apache-2.0
"""Which tokens a request's candidates may be, and which of them count, on the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner.upload import Upload


class Constraints:
    """One request's token ids, put into the pass's upload: of use once it was sent.

    Attributes:
        unconfident: int64 [N], those that the vocabulary has of ``Sampling.unconfident_token_ids``;
            None: none were given.
    """

    def __init__(self, sampling: Sampling, vocab_size: int, upload: Upload) -> None:
        def ids_of(token_ids: Sequence[int]) -> torch.Tensor:
            return upload.put(np.array(token_ids, dtype=np.int64))

        self._first_end_position = sampling.first_end_position
        self._biased = self._allowed = self._banned = self._ends = self.unconfident = None
        if sampling.logit_bias:
            token_ids, biases = zip(*sampling.logit_bias, strict=True)
            self._biased = ids_of(token_ids)
            self._biases = upload.put(np.array(biases, dtype=np.float32))
        if sampling.allowed_token_ids is not None:
            self._allowed = ids_of(sampling.allowed_token_ids)
        if sampling.banned_token_ids:
            self._banned = ids_of(sampling.banned_token_ids)
        if sampling.end_token_ids:
            self._ends = ids_of(sampling.end_token_ids)
        if sampling.unconfident_token_ids:
            known = [token for token in sampling.unconfident_token_ids if token < vocab_size]
            self.unconfident = ids_of(known)

    def apply(self, logits: torch.Tensor, positions: torch.Tensor) -> None:
        """Bias and forbid tokens in place, in the request's window rows [W, V] at ``positions``."""
        # By ids on the device: an index that is a list, or a mask, would stop the host.
        if self._biased is not None:
            biases = self._biases.to(logits.dtype).expand(len(logits), -1)
            logits.index_add_(-1, self._biased, biases)
        if self._allowed is not None:
            forbidden = torch.ones(logits.shape[-1], dtype=torch.bool, device=logits.device)
            logits.masked_fill_(forbidden.index_fill_(0, self._allowed, False), -torch.inf)
        if self._banned is not None:
            logits.index_fill_(-1, self._banned, -torch.inf)
        if self._ends is not None:
            early = (positions < self._first_end_position)[:, None]
            ends = logits.index_select(-1, self._ends).masked_fill_(early, -torch.inf)
            logits.index_copy_(-1, self._ends, ends)
