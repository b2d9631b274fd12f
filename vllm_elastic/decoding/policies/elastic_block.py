# SPDX-License-Identifier: Apache-2.0
"""Ours: a few probes say how far each block has drifted; only what matters is refreshed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.block_history import BlockHistory, attention_of_blocks
from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions, merged
from vllm_elastic.decoding.measurement import BlockProbe, Measured, MeasuredProbes
from vllm_elastic.decoding.plan import PassPlan, Segment, compute_everything
from vllm_elastic.decoding.policies.base import RefreshPolicy, Stale

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig
    from vllm_elastic.decoding.request import DenoisingRequest


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

    _history: BlockHistory  # from a request's first step on

    def __init__(self, config: ElasticConfig) -> None:
        super().__init__(config)
        self._probes = self._next_probes = NO_POSITIONS
        self._measures = False
        self._measured_at = 0  # a step
        self._judged_by: dict[str, npt.NDArray[np.floating]] = {}

    def begin_step(self, request: DenoisingRequest) -> None:
        step = request.record.denoising_steps
        if request.record.passes == 0:
            self._history = BlockHistory(request.validity.block_size, request.num_layers)
        self._history.extend(request.canvas.length, step)
        self._measures = step - self._measured_at >= self.config.measure_every
        self._probes = NO_POSITIONS
        if self._measures:  # the answer may have ended since they were chosen
            self._probes = self._next_probes[self._next_probes < request.refresh_end]

    def rows(self, request: DenoisingRequest, window_rows: Positions) -> Positions:
        near = request.near_commits()
        return merged(request.refresh_end, window_rows, self._probes, *near)

    def spend_spare_rows(self, request: DenoisingRequest, rows: Positions) -> None:
        """The costliest blocks are stale, as many as the coming pass has room for."""
        if not self.config.rows_per_pass:
            return
        step = request.record.denoising_steps
        computed = request.validity.join_layers() < request.num_layers
        computed[rows] = True
        computed = computed[: request.refresh_end]
        cost = self._history.attention * self._history.drift(step)
        ranked = np.argsort(-cost, kind="stable")
        ranked = ranked[cost[ranked] > 0]
        of_block = np.flatnonzero(~computed) // request.validity.block_size
        lacking = np.bincount(of_block, minlength=len(cost))[ranked]
        spare = self.config.rows_per_pass - int(computed.sum())
        chosen = ranked[np.cumsum(lacking) <= spare]
        request.validity.invalidate(self._join_layers(request, chosen))
        self._history.refreshed_at[chosen] = step

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
        # What the next step computes in any case is not watched by blocks.
        watched = np.zeros(request.canvas.length, dtype=np.bool_)
        watched[: request.refresh_end] = True
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
        history, step = self._history, plan.denoising_step
        self._measured_at = step
        if plan.computes_everything:
            history.restart(step)
        if measured.probe_drift is not None:
            history.take_probes(plan.probes, measured.probe_drift, step)
        history.attention, most_attended = attention_of_blocks(
            measured.attention, plan.measure.watched, request.validity.block_size
        )
        stale = self._verdict(request, step + self.config.measure_every)
        if stale is not None:
            refreshed = stale < request.num_layers
            history.refreshed_at[refreshed] = step + (request.refresh == "next")
        self._choose_probes(most_attended, step)
        return stale

    def judged_by(self) -> dict[str, list[float]]:
        """``attention`` that each block is paid and its expected ``drift``; cost is the product."""
        return {n: values.astype(float).round(6).tolist() for n, values in self._judged_by.items()}

    def pass_done(
        self, request: DenoisingRequest, plan: PassPlan, measured: Measured | None
    ) -> None:
        for segment in plan.segments:
            self._history.written(segment.positions, plan.denoising_step)

    def _verdict(self, request: DenoisingRequest, step: int) -> npt.NDArray[np.int16] | None:
        """int16 [blocks]: the join layers of those too costly at a step to come, L for others."""
        attention, drift = self._history.attention, self._history.drift(step)
        self._judged_by = {"attention": attention, "drift": drift}
        cost = attention * drift
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
        stale = np.full(len(self._history.rate), request.num_layers, dtype=np.int16)
        # The age of a block multiplies the drift of all layers alike.
        rate = self._history.rate[refreshed]
        drifted = rate > self.config.slack * rate.max(axis=1, keepdims=True)
        # argmax: the first layer whose input has; the one before is where to join.
        first = np.where(drifted.any(axis=1), drifted.argmax(axis=1), request.num_layers)
        stale[refreshed] = np.maximum(first - 1, 0)
        return stale

    def _choose_probes(self, most_attended: Positions, step: int) -> None:
        """The most attended position of the blocks whose drift is least known where it counts."""
        history = self._history
        due = history.attention * (step + 1 - history.probed_at)  # 0 where no position is watched
        ranked = (-due).argsort(kind="stable")[: self.config.probes]
        self._next_probes = np.sort(most_attended[ranked[due[ranked] > 0]])
