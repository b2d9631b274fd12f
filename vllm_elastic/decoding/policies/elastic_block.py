# SPDX-License-Identifier: Apache-2.0
"""Ours: a few probes a step say how far each block has drifted; only what matters is refreshed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions, merged
from vllm_elastic.decoding.measurement import BlockProbe, Measured, MeasuredProbes
from vllm_elastic.decoding.plan import PassPlan, Segment, compute_everything
from vllm_elastic.decoding.policies.base import RefreshPolicy, Stale

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest

Shares = npt.NDArray[np.float32]

GROWTH = 0.6
"""Drift is taken to grow with this power of the steps since the state was stored; measured are 0.5
to 1 (docs/drift.md)."""


class ElasticBlock(RefreshPolicy):
    """Blocks of the canvas, each with its own drift, attention and age.

    A *probe* is a position whose row joins a window pass only to be compared with what was stored
    of it: the relative change of its hidden state at each layer's input. It stands for its block.
    What a stale block costs is the attention the window pays to it times its drift; when the sum
    over all blocks exceeds ``block_drift``, the costliest blocks are refreshed until half of it is
    left. So the prompt, which hardly drifts, is rarely recomputed, however long it is.

    What drifts most by far are the neighbours of a token that was just committed; within ``reach``
    they are computed with it, and their blocks are judged by the rest of their positions.

    Blocks are probed in turn, the more attended ones more often. Between two probes of a block
    its drift is extrapolated from its age.

    Measuring costs a small model's pass a fifth of its time, so only one step in ``measure_every``
    does, and its verdict is about the last step before the next one that does.

    Where a pass of few rows takes as long as one of many, ``rows_per_pass`` says how many it should
    have: those to spare refresh the costliest blocks before their cost exceeds anything.
    """

    name = "elastic-block"
    refresh = "next"
    reach = 4
    early_exit = True

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self._probes = self._next_probes = NO_POSITIONS
        self._measures = False
        self._measured_at = 0  # a step
        self._rate: npt.NDArray[np.float32] | None = None
        self._attention: Shares = np.empty(0, dtype=np.float32)
        # Steps, of blocks and of positions.
        self._refreshed_at: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._probed_at = self._written_at = self._refreshed_at
        self._judged_by: dict[str, npt.NDArray[np.floating]] = {}

    def begin_step(self, request: DenoisingRequest) -> None:
        step = request.record.denoising_steps
        self._take_in_new(request, step)
        self._measures = step - self._measured_at >= self.config.measure_every
        self._probes = NO_POSITIONS
        if self._measures:  # the answer may have ended since they were chosen
            self._probes = self._next_probes[self._next_probes < request.looked_after]

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        near = request.near_commits()
        return merged(request.looked_after, window_rows, self._probes, *near)

    def spend_spare_rows(self, request: DenoisingRequest, rows: Positions) -> None:
        """The costliest blocks are stale, as many as the coming pass has room for."""
        if not self.config.rows_per_pass or self._rate is None:
            return
        step = request.record.denoising_steps
        computed = request.validity.join_layers() < request.num_layers
        computed[rows] = True
        computed = computed[: request.looked_after]
        cost = self._attention * self._drift(step)
        ranked = np.argsort(-cost, kind="stable")
        ranked = ranked[cost[ranked] > 0]
        of_block = np.flatnonzero(~computed) // request.validity.block_size
        lacking = np.bincount(of_block, minlength=len(cost))[ranked]
        spare = self.config.rows_per_pass - int(computed.sum())
        chosen = ranked[np.cumsum(lacking) <= spare]
        request.validity.invalidate(self._join_layers(request, chosen))
        self._refreshed_at[chosen] = step

    def measure(
        self,
        request: DenoisingRequest,
        segments: list[Segment],
        window_rows: Positions,
        rows: Positions,
    ) -> BlockProbe | None:
        if request.replays:  # the step's first pass has measured
            return None
        everything = compute_everything(segments, request.canvas.length)
        if not (self._measures or everything):
            return None
        # What the next step computes in any case is not looked after by blocks.
        watched = np.zeros(request.canvas.length, dtype=np.bool_)
        watched[: request.looked_after] = True
        watched.put(window_rows if everything else rows, False)
        return BlockProbe(
            probes=NO_POSITIONS if everything else self._probes,
            watched=watched,
            attention_stride=self.config.attention_stride,
        )

    def most_saved_rows(self, canvas: int, num_layers: int) -> int:
        return min(canvas, self.config.most_predicted) + min(canvas, self.config.probes)

    def judge(self, request: DenoisingRequest, plan: PassPlan, measured: Measured) -> Stale | None:
        assert isinstance(measured, MeasuredProbes) and isinstance(plan.measure, BlockProbe)
        step = plan.denoising_step
        self._measured_at = step
        if plan.computes_everything:
            self._start_over(request, step)
        self._take_probes(request, plan, measured, step)
        mass, most_attended = attention_of_blocks(
            measured.attention, plan.measure.watched, request.validity.block_size
        )
        self._attention = mass
        stale = self._verdict(request, step + self.config.measure_every)
        if stale is not None:
            refreshed = stale < request.num_layers
            self._refreshed_at[refreshed] = step + (request.refresh == "next")
        self._choose_probes(most_attended, step)
        return stale

    def judged_by(self) -> dict[str, list[float]]:
        """``attention`` that each block is paid and its expected ``drift``; cost is the product."""
        return {n: values.astype(float).round(6).tolist() for n, values in self._judged_by.items()}

    def pass_done(
        self, request: DenoisingRequest, plan: PassPlan, measured: Measured | None
    ) -> None:
        for segment in plan.segments:
            self._written_at.put(segment.positions, plan.denoising_step)

    def _take_in_new(self, request: DenoisingRequest, step: int) -> None:
        """What the canvas has grown by is as of this step; how fast it drifts is not known."""
        blocks, length = len(request.validity.stale_from), request.canvas.length
        if self._rate is None or len(self._written_at) == length:
            return
        new = blocks - len(self._rate)
        self._rate = np.pad(self._rate, ((0, new), (0, 0)))
        self._attention = np.pad(self._attention, (0, new))
        self._refreshed_at = np.append(self._refreshed_at, np.full(new, step))
        self._probed_at = np.append(self._probed_at, np.full(new, step))
        appended = np.full(length - len(self._written_at), step)
        self._written_at = np.append(self._written_at, appended)

    def _start_over(self, request: DenoisingRequest, step: int) -> None:
        """All blocks are as of this step."""
        blocks = len(request.validity.stale_from)
        self._refreshed_at = np.full(blocks, step)
        self._probed_at = np.full(blocks, step)
        self._written_at = np.full(request.canvas.length, step)
        if self._rate is None:
            self._rate = np.zeros((blocks, request.num_layers), dtype=np.float32)

    def _take_probes(
        self, request: DenoisingRequest, plan: PassPlan, measured: MeasuredProbes, step: int
    ) -> None:
        """Drift of a block per step^GROWTH, from the change since its probe was stored."""
        if measured.probe_drift is None:
            return
        assert self._rate is not None
        blocks = plan.probes // request.validity.block_size  # no two are of one block
        age = np.maximum(step - self._written_at[plan.probes], 1)
        self._rate[blocks] = measured.probe_drift / (age**GROWTH)[:, None]
        self._probed_at[blocks] = step

    def _drift(self, step: int) -> npt.NDArray[np.float64]:
        """float64 [blocks], expected at a step, of the layer where it is largest."""
        assert self._rate is not None
        return self._rate.max(axis=1) * np.maximum(step - self._refreshed_at, 0) ** GROWTH

    def _verdict(self, request: DenoisingRequest, step: int) -> npt.NDArray[np.int16] | None:
        """int16 [blocks]: the join layers of those too costly at a step to come, L for others."""
        drift = self._drift(step)
        self._judged_by = {"attention": self._attention, "drift": drift}
        cost = self._attention * drift
        total = float(cost.sum())
        if total <= self.config.block_drift:
            return None
        ranked = (-cost).argsort(kind="stable")
        left = total - cost[ranked].cumsum()
        ranked = ranked[: 1 + np.count_nonzero(left > self.config.block_drift / 2)]
        return self._join_layers(request, ranked[cost[ranked] > 0])

    def _join_layers(
        self, request: DenoisingRequest, refreshed: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.int16]:
        """int16 [blocks]: where those to be refreshed join, L for others."""
        assert self._rate is not None
        stale = np.full(len(self._rate), request.num_layers, dtype=np.int16)
        rate = self._rate[refreshed]  # the age of a block multiplies the drift of all layers alike
        drifted = rate > self.config.slack * rate.max(axis=1, keepdims=True)
        # argmax: the first layer whose input has; the one before is where to join.
        first = np.where(drifted.any(axis=1), drifted.argmax(axis=1), request.num_layers)
        stale[refreshed] = np.maximum(first - 1, 0)
        return stale

    def _choose_probes(self, most_attended: Positions, step: int) -> None:
        """The most attended position of the blocks whose drift is least known where it counts."""
        due = self._attention * (step + 1 - self._probed_at)  # 0 where no position is watched
        ranked = (-due).argsort(kind="stable")[: self.config.probes]
        self._next_probes = np.sort(most_attended[ranked[due[ranked] > 0]])


def attention_of_blocks(
    attention: Shares, watched: npt.NDArray[np.bool_], block_size: int
) -> tuple[Shares, Positions]:
    """Attention by blocks of ``block_size`` positions, of watched positions alone.

    Args:
        attention: float32 [T]; watched: bool [T].

    Returns:
        float32 [blocks] the watched positions' attention, and int32 [blocks] the most attended one
        of each block, the smaller position on a tie, -1 where none is watched.
    """
    num_blocks = -(-len(attention) // block_size)
    by_position = np.full(num_blocks * block_size, -1.0, dtype=np.float32)
    np.copyto(by_position[: len(attention)], attention, where=watched)
    paid = by_position.reshape(num_blocks, block_size)
    most_attended = paid.argmax(axis=1) + np.arange(0, len(by_position), block_size)
    most_attended[by_position[most_attended] < 0] = -1
    return np.maximum(paid, 0).sum(axis=1), most_attended.astype(np.int32)
