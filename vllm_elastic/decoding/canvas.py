# SPDX-License-Identifier: Apache-2.0
"""The canvas of one request: prompt, masks, commits, and what may be shown already."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int32]
"""Canvas positions, ascending, 0 = first prompt token."""

NO_POSITIONS: Positions = np.empty(0, dtype=np.int32)


def merged(length: int, *sets: Positions | slice) -> Positions:
    """Positions below ``length`` that are in any of the sets or ranges, ascending.

    By flags, not by sorting: this runs for every request of a batch between two passes, and
    numpy's union takes ten times as long. (``put``: indexing by int32 takes twice as long.)
    """
    taken = np.zeros(length, dtype=np.bool_)
    for positions in sets:
        if isinstance(positions, slice):
            taken[positions] = True
        else:
            taken.put(positions, True)
    return taken.nonzero()[0].astype(np.int32)


class Canvas:
    """P prompt tokens, then N positions that start as the mask and are each committed once.

    A canvas that grows starts with the first ``grow_by`` of the N positions. When all are committed
    and none of them ends the answer, as many more are appended; with ``grow_ahead`` sooner: as soon
    as fewer positions than that stand from the first masked one on.

    Invariant: a committed position never changes. Positions at or after ``end`` that are still
    masked are dropped: they stay in the canvas as masks and are attended, but are never decoded.

    Attributes:
        length: T, of what is there; capacity: P + N.
        tokens: int32 [T].
        masked: bool [T], true until committed (dropped positions stay true).
        end: int, exclusive bound of what is decoded.
    """

    length: int
    end: int
    tokens: npt.NDArray[np.int32]
    masked: npt.NDArray[np.bool_]

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        num_new_tokens: int,
        mask_token_id: int,
        end_token_ids: frozenset[int] = frozenset(),
        answer: Sequence[int] | None = None,
        grow_by: int = 0,
        grow_ahead: int = 0,
    ) -> None:
        """Args:
        answer: infilling: N token ids, the mask's where a token is to be found. None: all masks.
        grow_by: 0: all N positions are there from the start.
        grow_ahead: 0: as 1.
        """
        self.prompt_length = len(prompt_token_ids)
        self.capacity = self.prompt_length + num_new_tokens
        self._all_tokens = np.full(self.capacity, mask_token_id, dtype=np.int32)
        self._all_tokens[: self.prompt_length] = prompt_token_ids
        if answer is not None:
            self._all_tokens[self.prompt_length :] = answer
        self._all_masked = self._all_tokens == mask_token_id
        self._all_masked[: self.prompt_length] = False
        self._end_token_ids = end_token_ids
        self._num_emitted = 0
        self._ended = False
        self._grow_by = grow_by or num_new_tokens
        self._grow_ahead = max(grow_ahead, 1)
        self._show(self.prompt_length)
        self._grow()

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
        """Fix tokens, drop what is masked beyond the leftmost end token, and grow if it is time."""
        masked = self.masked.take(positions)
        if np.count_nonzero(masked) < len(masked):
            raise ValueError(f"positions committed twice: {positions[~masked]}")
        self.tokens.put(positions, token_ids)
        self.masked.put(positions, False)
        for position, token_id in zip(positions.tolist(), token_ids.tolist(), strict=True):
            if token_id in self._end_token_ids:
                self.end = min(self.end, position + 1)
                self._ended = True
        self._grow()

    def _grow(self) -> None:
        """Append what is due."""
        if self._ended or self.length == self.capacity:
            return
        first = self.first_masked(1)
        start = int(first[0]) if first.size else self.length
        due = start + self._grow_ahead - self.length
        if due > 0:
            self._show(min(self.length + -(-due // self._grow_by) * self._grow_by, self.capacity))

    def _show(self, length: int) -> None:
        self.length = self.end = length
        self.tokens = self._all_tokens[:length]
        self.masked = self._all_masked[:length]

    def take_finished(self) -> list[int]:
        """Tokens that joined the finished left-to-right prefix since the last call.

        Ends with the end token (once) where one is reached.
        """
        start = self.shown
        holes = self.masked[start : self.end].nonzero()[0]
        stop = start + int(holes[0]) if holes.size else max(start, self.end)
        self._num_emitted += stop - start
        return self.tokens[start:stop].tolist()
