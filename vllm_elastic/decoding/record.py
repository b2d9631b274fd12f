# SPDX-License-Identifier: Apache-2.0
"""What a request cost, pass by pass: the record that tests, benchmarks and pictures share."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Canvas, Positions
from vllm_elastic.decoding.plan import PassPlan, PassResult
from vllm_elastic.decoding.validity import BlockValidity

BOUNDS = ("gamma", "block_drift")
"""Knobs that what a policy goes by is held against; a picture draws them."""


@dataclass(slots=True)
class DecodingRecord:
    """Counters of one request; one entry a pass where asked for (``keep_steps``, ``hand_on``).

    With ``keep_rows`` an entry also has ``segments`` ([join layer, rows] pairs, ascending),
    ``window`` (rows whose candidates are wanted), ``queries`` (rows whose attention is measured),
    ``attention_stride`` (in every n-th layer) and ``tested`` (rows of the drift test): what
    the pass costs on any machine.

    With ``keep_canvas`` an entry also has ``canvas``, from ``canvas_of_pass``: what a picture of
    the pass shows.

    Attributes:
        keep_steps: entries stay in ``steps`` to the end.
        hand_on: entries are for whoever calls ``take_steps`` after each pass.
        denoising_steps: steps finished; a step that is replayed counts once.
        passes: forward passes; a replay is a second one. kinds: how many of each kind.
        committed: tokens of the answer that were decided, the end token among them.
        row_layers: sum over passes and layers of the rows computed, discarded ones included.
        full_row_layers: T x L x denoising steps, what recomputing everything takes.
        seconds: from admission to the end, filled in by whoever keeps the clock.
    """

    keep_steps: bool = False
    hand_on: bool = False
    keep_rows: bool = False
    keep_canvas: bool = False
    denoising_steps: int = 0
    passes: int = 0
    committed: int = 0
    row_layers: int = 0
    full_row_layers: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, Any]] = field(default_factory=list)
    _handed_on: int = 0

    def take_steps(self) -> list[dict[str, Any]]:
        """The entries since the last call; without ``keep_steps`` no other copy is left."""
        taken = self.steps[self._handed_on :]
        if self.keep_steps:
            self._handed_on = len(self.steps)
        else:
            self.steps = []
        return taken

    def add_pass(
        self,
        plan: PassPlan,
        num_layers: int,
        committed: list[int] | None,
        similarities: npt.NDArray[Any] | None,
        canvas: dict[str, Any] | None = None,
    ) -> None:
        """Count a pass.

        Args:
            committed: canvas positions; None for a pass that commits nothing (its step goes on).
            canvas: from ``canvas_of_pass``, with ``keep_canvas``.
        """
        self.passes += 1
        self.kinds[plan.kind.value] += 1  # plain strings: JSON and msgpack take them as they are
        self.row_layers += plan.row_layers(num_layers)
        if committed is not None:
            self.denoising_steps += 1
            self.committed += len(committed)
            self.full_row_layers += len(plan.tokens) * num_layers
        if self.keep_steps or self.hand_on:
            entry: dict[str, Any] = {
                "denoising_step": plan.denoising_step,
                "kind": plan.kind.value,
                "start_layer": plan.start_layer,
                "rows": plan.num_rows,
                "committed": committed or [],
            }
            if similarities is not None:
                entry["similarities"] = [
                    None if math.isnan(s) else round(float(s), 7) for s in similarities
                ]
            if self.keep_rows:
                entry["segments"] = [[s.join_layer, len(s.positions)] for s in plan.segments]
                entry["window"] = len(plan.window)
                entry["queries"] = len(plan.queries)
                entry["attention_stride"] = plan.attention_stride
                entry["tested"] = len(plan.tested)
                entry["saved_rows"] = plan.num_saved_rows
            if canvas is not None:
                entry["canvas"] = canvas
            self.steps.append(entry)


def canvas_of_pass(
    plan: PassPlan,
    result: PassResult,
    canvas: Canvas,
    validity: BlockValidity,
    judged_by: dict[str, Any],
) -> dict[str, Any]:
    """What a pass predicted, where it computed, and what it left stale; plain JSON values.

    Args:
        canvas: after the pass's commits.
        validity: after the policy's verdict on this pass.
        judged_by: from ``RefreshPolicy.judged_by``.

    Returns:
        predicted: [position, token id, probability] of each window position, the last as
        ``PassResult.probabilities`` has it. What is committed gets its last prediction's token.
        length: positions there were in the pass; an answer that grows has more in a later one.
        end: exclusive bound of those of them that are still decoded.
        spans: [first position, position behind the last, join layer] of the rows computed.
        compared: positions whose rows were compared with what was stored of them.
        block_size: positions; stale_from: of each block the first stale layer, L for none.
        judged_by: as given.
    """
    predictions = zip(
        plan.window.tolist(),
        result.token_ids.tolist(),
        result.probabilities.round(4).tolist(),
        strict=True,
    )
    return {
        "predicted": [list(prediction) for prediction in predictions],
        "length": len(plan.tokens),
        "end": min(canvas.end, len(plan.tokens)),
        "spans": [
            [first, stop, segment.join_layer]
            for segment in plan.segments
            for first, stop in _runs(segment.positions)
        ],
        "compared": (plan.probes if plan.probes.size else plan.tested).tolist(),
        "block_size": validity.block_size,
        "stale_from": validity.stale_from.tolist(),
        "judged_by": judged_by,
    }


def _runs(positions: Positions) -> list[tuple[int, int]]:
    """Stretches of neighbours, each from its first position up to the one behind its last."""
    if not positions.size:
        return []
    breaks = np.flatnonzero(np.diff(positions) != 1)
    firsts = positions[np.concatenate([[0], breaks + 1])]
    lasts = positions[np.concatenate([breaks, [len(positions) - 1]])]
    return list(zip(firsts.tolist(), (lasts + 1).tolist(), strict=True))
