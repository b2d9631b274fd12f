# SPDX-License-Identifier: Apache-2.0
"""What a refresh policy decides, and when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions
from vllm_elastic.decoding.plan import NO_POSITIONS, PassPlan, PassResult

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest


class RefreshPolicy:
    """Decides what a step recomputes. Reads the request, changes only its block validity.

    Attributes:
        name: what ``policy`` in the config calls it.
        measures: whether passes report the attention's drift and the most attended positions
            (tracked positions, similarities).
        probes_blocks: whether passes report the attention of blocks and the drift of probes.
        refresh, reach: where the config does not say (see ``ElasticConfig``).
    """

    name: ClassVar[str]
    measures: ClassVar[bool] = False
    probes_blocks: ClassVar[bool] = False
    refresh: ClassVar[str] = "replay"
    reach: ClassVar[int] = 0

    def __init__(self, config: ElasticConfig) -> None:
        self.config = config

    def begin_step(self, request: DenoisingRequest) -> None:
        """Before a denoising step's first pass: may invalidate blocks. A step may be planned
        more than once after a restart, never twice without one."""

    def predicted(self, request: DenoisingRequest, window: Positions) -> Positions:
        """Those positions of the window that a step predicts at first, ascending, at least one.

        Where too few of them reach the threshold, another pass predicts the rest. Asked
        again for a replay: depends on nothing that changes within a step.
        """
        return window

    def rows(self, request: DenoisingRequest, window: Positions) -> Positions:
        """Positions recomputed from layer 0 whether their block is stale or not.

        ``window``: the positions predicted. Not asked for a widened pass, whose rows are these.
        """
        return window

    def probes(self, request: DenoisingRequest) -> Positions:
        """Positions among ``rows`` whose drift the coming pass is to report, ascending."""
        return NO_POSITIONS

    def judge(
        self, request: DenoisingRequest, plan: PassPlan, result: PassResult
    ) -> npt.NDArray[np.int16] | int | None:
        """After every pass but a replay: from which layer blocks turned out to be stale.

        A widened pass has measured neither blocks nor drift.

        One layer for all blocks, int16 [blocks], or None: the pass stands.
        """
        return None
