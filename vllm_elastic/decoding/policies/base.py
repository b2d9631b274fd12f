# SPDX-License-Identifier: Apache-2.0
"""What a refresh policy decides, and when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions
from vllm_elastic.decoding.measurement import Measure, Measured
from vllm_elastic.decoding.plan import PassPlan, Segment

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest

Stale = npt.NDArray[np.int16] | int
"""From which layer on blocks are stale: int16 [blocks], or one layer for all of them."""


class RefreshPolicy:
    """Decides what a step recomputes. Reads the request, changes only its block validity.

    The hooks stand in the order in which a step calls them.

    Attributes:
        name: what ``policy`` in the config calls it.
        refresh, reach: where the config does not say (see ``ElasticConfig``).
        early_exit: behind an end token, where nobody will read, nothing is refreshed.
    """

    name: ClassVar[str]
    refresh: ClassVar[str] = "replay"
    reach: ClassVar[int] = 0
    early_exit: ClassVar[bool] = False

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config

    def begin_step(self, request: DenoisingRequest) -> None:
        """Before a denoising step's first pass: may invalidate blocks. A step may be planned
        more than once after a restart, never twice without one."""

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        """Positions recomputed from layer 0 whether their block is stale or not, ascending.

        ``window_rows``: the rows that the predictions are read from.
        """
        return window_rows

    def spend_spare_rows(self, request: DenoisingRequest, rows: Positions) -> None:
        """Before a step's first pass, once ``rows`` are known: may invalidate more blocks."""

    def measure(
        self,
        request: DenoisingRequest,
        segments: list[Segment],
        window_rows: Positions,
        rows: Positions,
    ) -> Measure | None:
        """What the coming pass is to measure.

        Args:
            segments: what it computes.
            rows: what ``rows`` said, and what the canvas has grown by; all of it is computed from
                layer 0 on, but in a replay.
        """
        return None

    def most_saved_rows(self, canvas: int, num_layers: int) -> int:
        """The most that ``PassPlan.num_saved_rows`` can be of a request with so many positions."""
        return 0

    def judge(self, request: DenoisingRequest, plan: PassPlan, measured: Measured) -> Stale | None:
        """After a step's first pass, where it measured something: what turned out to be stale.

        None: the pass stands.
        """
        return None

    def judged_by(self) -> dict[str, list[float]]:
        """What the last ``judge`` went by, one number a block under each name; for records."""
        return {}

    def pass_done(
        self, request: DenoisingRequest, plan: PassPlan, measured: Measured | None
    ) -> None:
        """After every pass, whatever becomes of it."""
