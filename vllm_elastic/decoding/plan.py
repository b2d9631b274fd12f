# SPDX-License-Identifier: Apache-2.0
"""What one forward pass computes: rows and join layers (see docs/design.md)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions, merged
from vllm_elastic.decoding.grammar import TokenBits
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, Measure, Measured
from vllm_elastic.decoding.sampling import Sampling

BlockIds = npt.NDArray[np.int32]
"""vLLM's KV blocks of a request, in the order of the positions that they hold."""

NO_BLOCKS: BlockIds = np.empty(0, dtype=np.int32)


class PassKind(StrEnum):
    """What the record and the metrics call a pass."""

    FIRST = auto()  # a request's first: the whole canvas from the embedding on
    FULL = auto()  # the whole canvas once more
    WINDOW = auto()  # nothing is stale: the rows that the policy names, from layer 0 on
    REFRESH = auto()  # these, and stale blocks
    REPLAY = auto()  # a step once more, with what its first pass found stale


@dataclass(slots=True)
class Segment:
    """Rows of one request that join a pass at one layer.

    Join layer 0 starts from the embedding (or from a stored input, see ``stored_inputs`` below),
    j > 0 from the stored hidden state at layer j's input.
    """

    join_layer: int
    positions: Positions


@dataclass(slots=True)
class Logprobs:
    """Log probabilities of W tokens, each with its most probable alternatives.

    Attributes:
        token_ids: int32 [W, 1 + k], the token itself first, then the k most probable ones.
        logprobs: float32 [W, 1 + k]; ranks: int32 [W], 1 = most probable.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]

    def take(self, indices: npt.NDArray[np.intp]) -> Logprobs:
        """The log probabilities of a selection of the tokens."""
        return Logprobs(self.token_ids[indices], self.logprobs[indices], self.ranks[indices])


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One request's part in a forward pass.

    Attributes:
        segments: ascending join layer; layer l works on the segments with join_layer <= l.
        tokens: int32 [T], the canvas.
        window: positions whose candidates are wanted.
        logits_shift: the candidates of position p are read from row p - logits_shift.
        measure: what the policy wants to know of this pass; None: nothing.
        sampling: what the request wants of its candidates; None: the most probable token.
        stored_inputs: positions whose input of layer 0 is stored, not their token's embedding.
        allowed: what the window's first position may be, by the request's grammar; None: anything.
        adapter: the request's (LoRA); None: it has none.
        num_written: positions whose KV blocks earlier passes have written; what those behind hold
            is another request's.
        block_ids: int32, the KV blocks of these T positions.
    """

    request_id: str
    kind: PassKind
    denoising_step: int
    segments: list[Segment]
    tokens: npt.NDArray[np.int32]
    window: Positions
    logits_shift: int = 0
    measure: Measure | None = None
    sampling: Sampling | None = None
    stored_inputs: Positions = field(default_factory=lambda: NO_POSITIONS)
    allowed: TokenBits | None = None
    adapter: Any = None
    num_written: int = 0
    block_ids: BlockIds = field(default_factory=lambda: NO_BLOCKS)

    @property
    def window_rows(self) -> Positions:
        """Rows that the window's candidates are read from; their attention is the window's."""
        return rows_of_window(self.window, self.logits_shift)

    @property
    def num_rows(self) -> int:
        return sum(len(segment.positions) for segment in self.segments)

    @property
    def start_layer(self) -> int:
        return self.segments[0].join_layer

    @property
    def computes_everything(self) -> bool:
        """Whether every position is computed from the embedding on."""
        return compute_everything(self.segments, len(self.tokens))

    @property
    def tested(self) -> Positions:
        """Rows whose attention is compared with what it was."""
        return self.measure.tested if isinstance(self.measure, DriftTest) else NO_POSITIONS

    @property
    def probes(self) -> Positions:
        """Rows whose hidden states are compared with what they were."""
        return self.measure.probes if isinstance(self.measure, BlockProbe) else NO_POSITIONS

    @property
    def attention_stride(self) -> int:
        """Attention is read in the last layer and every n-th before it."""
        return self.measure.attention_stride if isinstance(self.measure, BlockProbe) else 1

    @property
    def queries(self) -> Positions:
        """Rows whose attention is worked out once more, for the measurement."""
        if self.measure is None:
            return NO_POSITIONS
        if not self.tested.size:
            return self.window_rows
        return merged(len(self.tokens), self.window_rows, self.tested)

    @property
    def num_saved_rows(self) -> int:
        """Rows of which something of every layer is kept, each as often as something is."""
        if self.measure is None:
            return 0
        old_keys = len(self.segments[0].positions) if self.tested.size else 0
        # Of a tested row the old query and the old input.
        return len(self.queries) + 2 * self.tested.size + old_keys + len(self.probes)

    def row_layers(self, num_layers: int) -> int:
        """Rows computed, summed over layers: the machine-independent measure of work."""
        return sum(len(s.positions) * (num_layers - s.join_layer) for s in self.segments)


@dataclass(slots=True)
class PassResult:
    """What a pass reports of one request.

    Attributes:
        token_ids: int32 [W], the candidate of each window position.
        probabilities: float64 [W], its probability, or its confidence as ``Sampling.alg`` has it;
            NaN where the logits were not finite.
        entropies: float64 [W], of the distributions that they are of, in nats; None: not asked for.
        logprobs: of the window's candidates; None: not asked for.
        measured: of the kind that the plan's ``measure`` asks for; None: nothing was.
        fault: why all this is of no use and the request has to end; None: there is none.
    """

    token_ids: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    entropies: npt.NDArray[np.float64] | None = None
    logprobs: Logprobs | None = None
    measured: Measured | None = None
    fault: str | None = None


def rows_of_window(window: Positions, logits_shift: int) -> Positions:
    """Rows that the candidates of these positions are read from."""
    return window - np.int32(logits_shift) if logits_shift else window


def compute_everything(segments: list[Segment], length: int) -> bool:
    """Whether they compute every position of a canvas of this length from the embedding on."""
    return segments[0].join_layer == 0 and len(segments[0].positions) == length


def segments_by_join_layer(join_layers: npt.NDArray[np.int16], num_layers: int) -> list[Segment]:
    """Group the positions that take part (join layer < L) by their join layer, ascending."""
    counts = np.bincount(join_layers, minlength=num_layers)
    return [
        Segment(layer, (join_layers == layer).nonzero()[0].astype(np.int32))
        for layer in counts[:num_layers].nonzero()[0].tolist()
    ]
