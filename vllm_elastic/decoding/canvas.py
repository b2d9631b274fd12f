# SPDX-License-Identifier: Apache-2.0
"""The canvas of one request: prompt, masks, commits, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]
"""Canvas positions, ascending, 0 = first prompt token."""

NO_POSITIONS: Positions = np.empty(0, dtype=np.int32)


def merged(length: int, *sets: Positions) -> Positions:
    """Positions below ``length`` that are in any of the sets, ascending.

    By flags, not by sorting: this runs for every request of a batch between two passes, and
    numpy's union takes ten times as long.
    """
    taken = np.zeros(length, dtype=np.bool_)
    for positions in sets:
        taken[positions] = True
    return taken.nonzero()[0].astype(np.int32)


class Canvas:
    """P prompt tokens, then N positions that start as the mask and are each committed once.

    Invariant: a committed position never changes; ``end`` never grows. Positions at or after
    ``end`` that are still masked are dropped: they stay in the canvas as masks and are attended,
    but are never decoded.

    Attributes:
        tokens: int32 [T], T = P + N.
        masked: bool [T], true until committed (dropped positions stay true).
        end: int, exclusive bound of what is decoded.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        num_new_tokens: int,
        mask_token_id: int,
        end_token_ids: frozenset[int] = frozenset(),
        answer: Sequence[int] | None = None,
    ) -> None:
        """Args:
        answer: infilling: N token ids, the mask's where a token is to be found. None: all masks.
        """
        self.prompt_length = len(prompt_token_ids)
        self.length = self.prompt_length + num_new_tokens
        self.tokens = np.full(self.length, mask_token_id, dtype=np.int32)
        self.tokens[: self.prompt_length] = prompt_token_ids
        if answer is not None:
            self.tokens[self.prompt_length :] = answer
        self.masked = self.tokens == mask_token_id
        self.masked[: self.prompt_length] = False
        self.end = self.length
        self._end_token_ids = end_token_ids
        self._num_emitted = 0

    @property
    def done(self) -> bool:
        """No position is left to decode."""
        return not self.masked[: self.end].any()

    @property
    def shown(self) -> int:
        """Position behind the finished prefix that ``take_finished`` has returned so far."""
        return self.prompt_length + self._num_emitted

    def first_masked(self, count: int, start: int = 0, stop: int | None = None) -> Positions:
        """The first ``count`` positions in [start, stop) still to be decoded, holes skipped."""
        stop = self.end if stop is None else min(stop, self.end)
        return (self.masked[start:stop].nonzero()[0][:count] + start).astype(np.int32)

    def commit(self, positions: Positions, token_ids: npt.NDArray[np.int32]) -> None:
        """Fix tokens, and drop what is masked beyond the leftmost end token."""
        if not self.masked[positions].all():
            raise ValueError(f"positions committed twice: {positions[~self.masked[positions]]}")
        self.tokens[positions] = token_ids
        self.masked[positions] = False
        for position, token_id in zip(positions.tolist(), token_ids.tolist(), strict=True):
            if token_id in self._end_token_ids:
                self.end = min(self.end, position + 1)

    def take_finished(self) -> list[int]:
        """Tokens that joined the finished left-to-right prefix since the last call.

        Ends with the end token (once) where one is reached.
        """
        start = self.shown
        holes = np.flatnonzero(self.masked[start : self.end])
        stop = start + int(holes[0]) if holes.size else max(start, self.end)
        self._num_emitted += stop - start
        return self.tokens[start:stop].tolist()
