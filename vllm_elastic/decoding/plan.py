# SPDX-License-Identifier: Apache-2.0
"""What one forward pass computes: rows and join layers (see docs/design.md)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions, merged
from vllm_elastic.decoding.sampling import Sampling

NO_POSITIONS: Positions = np.empty(0, dtype=np.int32)


@dataclass(slots=True)
class Segment:
    """Rows of one request that join a pass at one layer.

    Join layer 0 starts from the embedding, j > 0 from the stored hidden state at layer j's input.
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
        """The same of a selection of the tokens."""
        return Logprobs(self.token_ids[indices], self.logprobs[indices], self.ranks[indices])

    def followed_by(self, other: Logprobs) -> Logprobs:
        """The tokens of both, these first."""
        return Logprobs(
            np.concatenate([self.token_ids, other.token_ids]),
            np.concatenate([self.logprobs, other.logprobs]),
            np.concatenate([self.ranks, other.ranks]),
        )


@dataclass(slots=True)
class PassPlan:
    """One request's part in a forward pass.

    Attributes:
        kind: ``first``, ``window``, ``replay`` or ``full``: what the record calls this pass.
        segments: ascending join layer; layer l works on the segments with join_layer <= l.
        tokens: int32 [T], the canvas.
        window: positions whose candidates are wanted; their attention is the attention mass.
        tested: rows whose attention is compared before and after the pass (drift test).
        tested_layers: layers, counted from 0, in which no stale row takes part yet; None: all.
        trackable: bool [T], positions that may be tracked, or None: no statistics wanted.
        sampling: what the request wants of its candidates; None: the most probable token.
        probes: rows of the first segment whose stored hidden states are compared with the new.
        granularity: positions a block has whose attention is wanted; 0: not wanted.
        attention_stride: it is wanted of the last layer and of every so manyth before it.
        watched: bool [T], positions whose attention counts for their block, or None.
        fresh: the first pass over these KV blocks; what they hold is another request's.
        block_ids: the request's KV blocks, filled in by whoever owns them.
    """

    request_id: str
    kind: str
    denoising_step: int
    segments: list[Segment]
    tokens: npt.NDArray[np.int32]
    window: Positions
    tested: Positions = field(default_factory=lambda: NO_POSITIONS)
    tested_layers: int | None = None
    trackable: npt.NDArray[np.bool_] | None = None
    track_num: int = 1
    statistic: str = "released"
    sampling: Sampling | None = None
    probes: Positions = field(default_factory=lambda: NO_POSITIONS)
    granularity: int = 0
    attention_stride: int = 1
    watched: npt.NDArray[np.bool_] | None = None
    fresh: bool = False
    block_ids: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(len(segment.positions) for segment in self.segments)

    @property
    def start_layer(self) -> int:
        return self.segments[0].join_layer

    @property
    def computes_everything(self) -> bool:
        """Whether every position is computed from the embedding on."""
        return self.start_layer == 0 and len(self.segments[0].positions) == len(self.tokens)

    @property
    def queries(self) -> Positions:
        """Positions whose attention may be worked out: the window and what is tested."""
        if not self.tested.size:
            return self.window
        return merged(len(self.tokens), self.window, self.tested)

    @property
    def num_queries(self) -> int:
        """Rows whose attention is worked out once more, for the statistics."""
        if self.trackable is None and not self.granularity:
            return 0
        return len(self.queries)

    def row_layers(self, num_layers: int) -> int:
        """Rows computed, summed over layers: the machine-independent measure of work."""
        return sum(len(s.positions) * (num_layers - s.join_layer) for s in self.segments)


@dataclass(slots=True)
class PassResult:
    """What a pass reports of one request.

    Attributes:
        token_ids: int32 [W], the most probable token of each window position.
        probabilities: float64 [W], its probability; NaN where the logits were not finite.
        most_attended: int32 [layers, track_num], layers from the pass's start layer on, -1 where
            fewer positions may be tracked; None: not asked for.
        similarities: float32 [tested layers], 1 = no drift, NaN in layers whose input is not
            stored; None: no test asked for.
        probe_drift: float32 [probes, L], relative change of the input of each layer (0 in layer
            0, whose input is the embedding, and where it is not stored); None: nothing probed.
        block_mass: float32 [blocks], share of the window's attention, mean over heads and layers.
        block_probes: int32 [blocks], the most attended watched position of each block, -1: none.
        logprobs: of the window's candidates; None: not asked for.
    """

    token_ids: npt.NDArray[np.int32]
    probabilities: npt.NDArray[np.float64]
    most_attended: npt.NDArray[np.int32] | None = None
    similarities: npt.NDArray[np.float32] | None = None
    logprobs: Logprobs | None = None
    probe_drift: npt.NDArray[np.float32] | None = None
    block_mass: npt.NDArray[np.float32] | None = None
    block_probes: npt.NDArray[np.int32] | None = None


def join_candidates(
    window: Positions, result: PassResult, other_window: Positions, other: PassResult
) -> tuple[Positions, PassResult]:
    """The windows of two passes and their candidates as one, ascending; no statistics."""
    order = np.argsort(both := np.concatenate([window, other_window]))
    joined = PassResult(
        np.concatenate([result.token_ids, other.token_ids])[order],
        np.concatenate([result.probabilities, other.probabilities])[order],
    )
    if result.logprobs is not None and other.logprobs is not None:
        joined.logprobs = result.logprobs.followed_by(other.logprobs).take(order)
    return both[order], joined


def segments_by_join_layer(join_layers: npt.NDArray[np.int16], num_layers: int) -> list[Segment]:
    """Group the positions that take part (join layer < L) by their join layer, ascending."""
    counts = np.bincount(join_layers, minlength=num_layers)
    return [
        Segment(layer, (join_layers == layer).nonzero()[0].astype(np.int32))
        for layer in counts[:num_layers].nonzero()[0].tolist()
    ]
