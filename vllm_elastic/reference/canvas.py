# SPDX-License-Identifier: Apache-2.0
"""The canvas of one request: its tokens, and which positions are still to be decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .llada import LLaDA


class Canvas:
    """P prompt tokens, then N masks: T = P + N positions, or fewer of a canvas that grows.

    A position is *masked* as long as it holds the mask token, and *open* if it is masked and
    not dropped. Dropped positions lie beyond an EOS: they keep the mask token, stay keys that
    everyone attends to, and are never decoded.

    Args:
        model: whose mask token, EOS token, length limit and device apply.
        prompt_ids: P >= 1 token ids, none of them the mask token.
        max_tokens: N >= 1.
        drop_after_every_eos: drop masked positions beyond every committed EOS, not beyond those
            of the first commit that has one only (what the released code does).
        grow_by: 0, or the masks that are there at first; as many more are appended whenever none of
            these is open and no EOS has been committed, N in all (iLLaDA's decoder).
        grow_ahead: they are appended earlier, and more than once if need be, at the start too:
            whenever the first open position and those behind it are fewer than this (ours).

    Raises:
        ValueError: empty prompt or response (with shifted logits the first position has no row that
            predicts it), token outside the vocabulary, mask token in the
            prompt (it would be ambiguous what is to be decoded), or T beyond the model's length.
    """

    def __init__(
        self,
        model: LLaDA,
        prompt_ids: Sequence[int],
        max_tokens: int,
        drop_after_every_eos: bool = True,
        grow_by: int = 0,
        grow_ahead: int = 0,
    ) -> None:
        config = model.config
        total = len(prompt_ids) + max_tokens
        if len(prompt_ids) < 1 or max_tokens < 1:
            raise ValueError("a canvas needs at least one prompt token and one response token")
        if total > config.max_sequence_length:
            limit = config.max_sequence_length
            raise ValueError(f"a canvas of {total} positions is beyond the model's {limit}")
        if not all(0 <= token < config.embedding_size for token in prompt_ids):
            raise ValueError(f"prompt has token ids outside 0..{config.embedding_size - 1}")
        if config.mask_token_id in prompt_ids:
            raise ValueError(f"prompt contains the mask token {config.mask_token_id}")
        self.prompt_length = len(prompt_ids)
        first = min(grow_by, max_tokens) if grow_by else max_tokens
        self.tokens = torch.tensor(
            [*prompt_ids, *[config.mask_token_id] * first], device=model.device
        )  # (T,) int64
        self.masked = self.tokens == config.mask_token_id  # (T,) bool
        self.dropped = torch.zeros_like(self.masked)  # (T,) bool
        self._mask_token_id = config.mask_token_id
        self._grow_by, self._to_come = grow_by, max_tokens - first
        self._grow_ahead = grow_ahead
        self._logits_shift = config.logits_shift
        self._eos_token_id = config.eos_token_id
        self._drop_after_every_eos = drop_after_every_eos
        self._ended = False  # an EOS has been committed
        self._end = total
        self.grow()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def everywhere(self) -> Tensor:
        """(T,) all positions."""
        return torch.arange(len(self), device=self.tokens.device)

    @property
    def to_be_shown(self) -> int:
        """Positions that may still be shown: up to the leftmost EOS committed, all without one."""
        return min(self._end, len(self))

    def open(self) -> Tensor:
        """(n,) positions still to be decoded, ascending."""
        return (self.masked & ~self.dropped).nonzero().flatten()

    def window(self, size: int) -> Tensor:
        """The first ``size`` open positions, holes skipped; fewer if fewer are left."""
        return self.open()[:size]

    def grow(self) -> Tensor:
        """Append the next masks if it is time for them; (n,) their positions."""
        before = len(self)
        while self._to_come and not self._ended:
            ahead = len(self) - int(self.open()[0]) if len(self.open()) else 0
            if ahead and ahead >= self._grow_ahead:
                break
            count = min(self._grow_by, self._to_come)
            self._to_come -= count
            masks = self.tokens.new_full((count,), self._mask_token_id)
            self.tokens = torch.cat([self.tokens, masks])
            self.masked = torch.cat([self.masked, torch.ones_like(masks, dtype=torch.bool)])
            self.dropped = torch.cat([self.dropped, torch.zeros_like(masks, dtype=torch.bool)])
        return self.everywhere[before:]

    def rows_predicting(self, positions: Tensor) -> Tensor:
        """(n,) rows whose output predicts (n,) response positions; see ``logits_shift``."""
        return positions - self._logits_shift

    def commit(self, positions: Tensor, token_ids: Tensor) -> None:
        """Fix (n,) masked positions to (n,) tokens for good, and apply the EOS rule.

        Elastic-Cache, step 7. Several EOS in one commit: the leftmost counts.
        """
        self.tokens[positions] = token_ids
        self.masked[positions] = False
        if self._eos_token_id is None:
            return
        ends = positions[token_ids == self._eos_token_id].tolist()
        self._end = min([self._end, *(end + 1 for end in ends)])
        if ends and (self._drop_after_every_eos or not self._ended):
            self.dropped[min(ends) + 1 :] = self.masked[min(ends) + 1 :]
            self._ended = True

    def answer(self) -> list[int]:
        """The response's tokens up to and without its first EOS."""
        response: list[int] = self.tokens[self.prompt_length :].tolist()
        if self._eos_token_id is not None and self._eos_token_id in response:
            return response[: response.index(self._eos_token_id)]
        return response


def union(*positions: Tensor) -> Tensor:
    """(n,) all positions of several tensors, each once, ascending."""
    together: Tensor = torch.cat(positions).unique()
    return together


def index_in(rows: Tensor, positions: Tensor) -> Tensor:
    """Where ``positions`` (n,) stand among the ascending ``rows`` (R,) that contain them."""
    return torch.searchsorted(rows, positions)
