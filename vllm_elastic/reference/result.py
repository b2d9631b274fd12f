# SPDX-License-Identifier: Apache-2.0
"""What a decoder hands back, in the terms in which ``vllm_elastic.bench`` records a request."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

import torch
from torch import Tensor

from .canvas import Canvas
from .commit import CommitOptions


class Pass(TypedDict):
    """One forward pass as the engine counts them.

    ``kind``: "first" (a request's first step), "full" (whole canvas again), "window" (some rows,
    from layer 0), "refresh" (with stale blocks) or "replay" (from ``start_layer``). ``committed``
    are canvas positions, ascending; none in a pass that is not its step's last.
    """

    denoising_step: int
    kind: str
    start_layer: int
    rows: int
    committed: list[int]


@dataclass
class DecodingResult:
    """An answer and the work it took.

    Attributes:
        canvas_ids: T tokens, prompt included; dropped positions hold the mask token.
        token_ids: the response up to and without its first EOS.
        denoising_steps: a step that refreshes counts once.
        steps: one entry per pass, in order.
        row_layers: sum over passes and layers of the rows computed.
        full_row_layers: T x layers x denoising steps, what recomputing everything takes.
        similarities: per denoising step, of the tested layers 0, 1, ...; empty if none was tested.
        tracked: per denoising step, the tracked positions it tested, ascending.
        margins: per denoising step, the margin of its closest decision; see ``margin``.
        dropped: positions left undecoded beyond an EOS, ascending.
    """

    canvas_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    denoising_steps: int = 0
    steps: list[Pass] = field(default_factory=list)
    row_layers: int = 0
    full_row_layers: int = 0
    similarities: list[list[float]] = field(default_factory=list)
    tracked: list[list[int]] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)
    _closest: float = math.inf
    _predicted: dict[int, tuple[int, float]] = field(default_factory=dict)
    _credit: dict[int, dict[int, float]] = field(default_factory=dict)

    def lasting(self, positions: Tensor, token_ids: Tensor, confidence: Tensor) -> Tensor:
        """(n,): the lower of the confidences now and when this was last asked, 0 for a token that
        was not predicted there then. Remembers these predictions, (n,) each, for the next time."""
        now = {
            position: (token, sureness)
            for position, token, sureness in zip(
                positions.tolist(), token_ids.tolist(), confidence.tolist(), strict=True
            )
        }
        found = torch.zeros_like(confidence)
        for index, (position, (token, sureness)) in enumerate(now.items()):
            token_then, sureness_then = self._predicted.get(position, (None, 0.0))
            if token == token_then:
                found[index] = min(sureness, sureness_then)
        self._predicted = now
        return found

    def credited(
        self, positions: Tensor, token_ids: Tensor, confidence: Tensor, options: CommitOptions
    ) -> Tensor:
        """(n,) confidences of the predictions (n,) each, with what their tokens have earned so far.

        CreditDecoding with the constants of dInfer: of every position the credit of each token
        falls to ``credit_decay`` of it at each step, and the predicted one's then grows by its
        confidence to the power 0.2. ``credit_weight`` times log(1 + credit) is added to the
        predicted token's logit, and to no other one (ours; theirs adds it to all).
        """
        fused = confidence.clone()
        now: dict[int, dict[int, float]] = {}
        for index, position in enumerate(positions.tolist()):
            token, p = int(token_ids[index]), float(confidence[index])
            before = self._credit.get(position, {})
            credit = {t: c * options.credit_decay for t, c in before.items()}
            credit[token] = credit.get(token, 0.0) + p**0.2
            now[position] = credit
            if 0 < p < 1:
                logit = math.log(p / (1 - p)) + options.credit_weight * math.log1p(credit[token])
                fused[index] = 1 / (1 + math.exp(-logit))
        self._credit = now
        return fused

    def close_call(self, *margins: float) -> None:
        """Margins of decisions of the step that ``record`` will add."""
        self._closest = min(self._closest, *margins)

    @property
    def passes(self) -> int:
        """Forward passes (NFE); a replay is a second one."""
        return len(self.steps)

    def record(
        self,
        passes: list[tuple[str, int, int]],
        committed: list[int],
        n_layers: int,
        canvas_length: int,
        similarities: list[float] | None = None,
        tracked: list[int] | None = None,
        row_layers: int | None = None,
    ) -> None:
        """Add one denoising step: its passes as (kind, start layer, rows), the last commits.

        ``row_layers``: of all passes together, where rows join at different layers.
        """
        for kind, start_layer, rows in passes:
            self.steps.append(
                Pass(
                    denoising_step=self.denoising_steps,
                    kind=kind,
                    start_layer=start_layer,
                    rows=rows,
                    committed=[],
                )
            )
            if row_layers is None:
                self.row_layers += rows * (n_layers - start_layer)
        self.row_layers += row_layers or 0
        self.steps[-1]["committed"] = committed
        self.full_row_layers += canvas_length * n_layers
        self.similarities.append(similarities or [])
        self.tracked.append(tracked or [])
        self.margins.append(self._closest)
        self._closest = math.inf
        self.denoising_steps += 1

    def finish(self, canvas: Canvas) -> DecodingResult:
        """Take the answer from the canvas; returns itself."""
        self.canvas_ids = canvas.tokens.tolist()
        self.token_ids = canvas.answer()
        self.dropped = canvas.dropped.nonzero().flatten().tolist()
        return self
