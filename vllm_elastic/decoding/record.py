# SPDX-License-Identifier: Apache-2.0
"""What a request cost, pass by pass: the record that tests, benchmarks and pictures share."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from vllm_elastic.decoding.plan import PassPlan


@dataclass(slots=True)
class DecodingRecord:
    """Counters of one request; one entry a pass where asked for (``keep_steps``).

    With ``keep_rows`` an entry also has ``segments`` ([join layer, rows] pairs, ascending),
    ``window`` (rows whose candidates are wanted), ``queries`` (rows whose attention is measured),
    ``attention_stride`` (in every so manyth layer) and ``tested`` (rows of the drift test): what
    the pass costs on any machine.

    Attributes:
        denoising_steps: steps finished; a step that is replayed counts once.
        passes: forward passes; a replay is a second one. kinds: how many of each kind.
        row_layers: sum over passes and layers of the rows computed, discarded ones included.
        full_row_layers: T x L x denoising steps, what recomputing everything takes.
        seconds: from admission to the end, filled in by whoever keeps the clock.
    """

    keep_steps: bool = False
    keep_rows: bool = False
    denoising_steps: int = 0
    passes: int = 0
    row_layers: int = 0
    full_row_layers: int = 0
    seconds: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, Any]] = field(default_factory=list)

    def add_pass(
        self,
        plan: PassPlan,
        num_layers: int,
        committed: list[int] | None,
        similarities: npt.NDArray[Any] | None,
    ) -> None:
        """Count a pass. ``committed``: canvas positions, None for a pass that is replayed."""
        self.passes += 1
        self.kinds[plan.kind] += 1
        self.row_layers += plan.row_layers(num_layers)
        if committed is not None:
            self.denoising_steps += 1
            self.full_row_layers += len(plan.tokens) * num_layers
        if self.keep_steps:
            entry: dict[str, Any] = {
                "denoising_step": plan.denoising_step,
                "kind": plan.kind,
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
            self.steps.append(entry)
