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
        saved_rows: of which something of every layer (a query, a key, an input) is kept for
            measurements, each as often as something is.
    """

    rows: int
    saved_rows: int

    @classmethod
    def of(cls, rows: int, seats: int, window: int, max_window: int, canvas: int) -> StepLimits:
        """The limits of an engine.

        Args:
            rows: a step's row budget; seats: requests that run at a time.
            window: positions that a request predicts at a step, where it does not say otherwise.
            max_window: that any request may predict.
            canvas: positions of the longest canvas. One request saves at most four rows a
                position: its query; its query, its input and its key as they were. So a canvas
                of ``max_window`` is always within the limits; a request whose longer one might
                not be is refused (``RefreshPolicy.most_saved_rows``).
        """
        return cls(rows, max(4 * min(canvas, max_window), min(rows, 2 * seats * window)))
