# SPDX-License-Identifier: Apache-2.0
"""How much the requests of one step may take together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepLimits:
    """A request that takes more than this alone runs alone.

    The trial run at start allocates what these limits allow, so that no legal load can take more.

    Attributes:
        rows: that are computed (``max_num_batched_tokens``).
        saved_rows: of which queries or old keys of every layer are kept for measurements.
    """

    rows: int
    saved_rows: int

    @classmethod
    def of(cls, rows: int, seats: int, window: int, canvas: int) -> StepLimits:
        """The limits of an engine.

        Args:
            rows: a step's row budget; seats: requests that run at a time.
            window: positions that a request predicts at a step, where it does not say otherwise.
            canvas: positions of the longest canvas. One request saves at most three rows a
                position: its query, its query as it was, its key as it was.
        """
        return cls(rows, max(3 * canvas, min(rows, 2 * seats * window)))
