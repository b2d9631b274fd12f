# SPDX-License-Identifier: Apache-2.0
"""A request's part in a pass of each kind, made up: half of its canvas is prompt, half masked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import NO_POSITIONS
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, Measure
from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment
from vllm_elastic.decoding.sampling import Sampling

TRACKED = 4  # tracked and just committed rows beside the window

KINDS = {
    "full": "none",
    "window": "dual-cache",
    "window, sampled": "dual-cache",
    "window, elastic": "elastic",
    "window, elastic-block": "elastic-block",
    "refresh": "dual-cache",
}
"""Passes, and a policy whose scheduling is counted with each. Windows that are named after a policy
measure what it wants, sampled ones draw their tokens; a refresh computes the whole canvas from a
layer on."""

_SAMPLING = {"sampled": Sampling(temperature=0.7, top_p=0.9)}


@dataclass(frozen=True)
class PlanMaker:
    """Attributes:
    canvas, window: positions; refresh_from: the layer; vocabulary: tokens.
    block_size: positions of a KV block.
    """

    canvas: int
    window: int
    refresh_from: int
    vocabulary: int
    block_size: int

    @property
    def blocks_of_canvas(self) -> int:
        return -(-self.canvas // self.block_size)

    def plan(self, name: str, index: int) -> PassPlan:
        """The plan of request ``index``, which has KV blocks of its own; ``name``: of ``KINDS``."""
        kind, _, wish = name.partition(", ")
        everyone = np.arange(self.canvas, dtype=np.int32)
        masked = everyone >= self.canvas // 2
        window = everyone[masked][: self.window]
        stride = max(1, self.canvas // 2 // TRACKED)
        tracked = everyone[: self.canvas // 2 : stride][:TRACKED]
        segment = {
            PassKind.FULL: Segment(0, everyone),
            PassKind.REFRESH: Segment(self.refresh_from, everyone),
        }.get(PassKind(kind), Segment(0, np.union1d(window, tracked).astype(np.int32)))
        generator = np.random.default_rng(index)
        tokens = generator.integers(0, self.vocabulary - 2, self.canvas, dtype=np.int32)
        tokens[masked] = self.vocabulary - 1
        first = 1 + index * self.blocks_of_canvas
        return PassPlan(
            request_id=str(index),
            kind=PassKind(kind),
            denoising_step=0,
            segments=[segment],
            tokens=tokens,
            window=window,
            measure=self._measure(wish, tracked, segment.positions, ~masked),
            sampling=_SAMPLING.get(wish),
            num_written=self.canvas,  # not a request's first pass
            block_ids=np.arange(first, first + self.blocks_of_canvas, dtype=np.int32),
        )

    def _measure(
        self, policy: str, tracked: np.ndarray, computed: np.ndarray, trackable: np.ndarray
    ) -> Measure | None:
        if policy == "elastic":
            return DriftTest(
                tested=tracked if tracked.size else NO_POSITIONS,
                tested_layers=None,
                trackable=trackable,
                track_num=1,
                statistic="released",
            )
        if policy == "elastic-block":
            knobs = ElasticConfig(policy=policy)
            return BlockProbe(
                probes=tracked[: knobs.probes],
                watched=~np.isin(np.arange(self.canvas), computed),
                attention_stride=knobs.attention_stride,
            )
        return None
