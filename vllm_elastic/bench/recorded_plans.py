# SPDX-License-Identifier: Apache-2.0
"""Recorded passes as plans for a model of another size: the same rows, at the same relative depth.

A record has numbers of rows, and which positions each pass committed. So the window is what it was:
the first positions that were still masked. The rows beside it, whose places were not kept, are
taken from the left: what a pass takes depends on how many there are.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from vllm_elastic.bench.simulation.recording import at_depth
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, Measure
from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment


def plans_of(record: dict[str, Any], layers: int, vocabulary: int) -> list[PassPlan]:
    """All passes of one request, without its name and its KV blocks.

    Args:
        record: with what ``simulation.recording`` asks for, and ``prompt_tokens``.
        layers, vocabulary: of the model that runs them; its last token is the mask.

    Raises:
        ValueError: a pass has fewer rows at its first join layer than its window.
    """
    canvas = record["canvas"]
    tokens = np.random.default_rng(canvas).integers(0, vocabulary - 2, canvas, dtype=np.int32)
    masked = np.arange(canvas) >= record["prompt_tokens"]
    plans = []
    for number, entry in enumerate(record["steps"]):
        window = _window(masked, entry["window"])
        segments = _segments(entry, window, canvas, record["layers"], layers)
        plans.append(
            PassPlan(
                request_id="",
                kind=PassKind(entry["kind"]),
                denoising_step=entry["denoising_step"],
                segments=segments,
                tokens=np.where(masked, np.int32(vocabulary - 1), tokens),
                window=window,
                measure=_measure(record["policy"], entry, segments[0], window, masked),
                num_written=canvas if number else 0,
            )
        )
        masked = masked.copy()
        masked[entry["committed"]] = False
    return plans


def _window(masked: np.ndarray, count: int) -> Positions:
    """The first masked positions, and where there are fewer (an answer that grew, a window that
    has what follows too) the last of the others."""
    open_places = np.flatnonzero(masked)[:count]
    others = np.flatnonzero(~masked)
    rest = others[len(others) - (count - len(open_places)) :]
    return np.sort(np.concatenate([open_places, rest])).astype(np.int32)


def _segments(
    entry: dict[str, Any], window: Positions, canvas: int, recorded_layers: int, layers: int
) -> list[Segment]:
    counts: dict[int, int] = defaultdict(int)
    for join_layer, count in entry["segments"]:
        counts[at_depth(join_layer, recorded_layers, layers)] += count
    first, *later = sorted(counts)
    beside = counts[first] - len(window)
    if beside < 0:
        raise ValueError(
            f"a pass computes {counts[first]} rows from its first join layer on, fewer than the "
            f"{len(window)} of its window; no policy makes such a pass"
        )
    free = np.setdiff1d(np.arange(canvas, dtype=np.int32), window)
    segments = [Segment(first, np.union1d(window, free[:beside]))]
    for join_layer in later:
        rows = free[beside : beside + counts[join_layer]]
        segments.append(Segment(join_layer, rows))
        beside += counts[join_layer]
    return segments


def _measure(
    policy: str,
    entry: dict[str, Any],
    first: Segment,
    window: Positions,
    masked: np.ndarray,
) -> Measure | None:
    """What a pass measures: as many rows as were recorded; what the record does not say is the
    policy's default."""
    if not entry["queries"]:
        return None
    knobs = ElasticConfig(policy=policy)
    beside = np.setdiff1d(first.positions, window)
    if policy != "elastic":
        probes = entry["saved_rows"] - entry["queries"]
        return BlockProbe(
            probes=np.concatenate([beside, window])[:probes],
            watched=~np.isin(np.arange(len(masked)), first.positions),
            attention_stride=entry["attention_stride"],
        )
    # Some of the tested rows may be the window's: `queries` counts each once.
    in_window = len(window) + entry["tested"] - entry["queries"]
    tested = np.union1d(window[:in_window], beside[: entry["tested"] - in_window])
    return DriftTest(
        tested=tested.astype(np.int32) if entry["tested"] else NO_POSITIONS,
        tested_layers=None,
        trackable=~masked,
        track_num=knobs.track_num,
        statistic=knobs.statistic,
    )
