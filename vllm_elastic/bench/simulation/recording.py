# SPDX-License-Identifier: Apache-2.0
"""Run files as work: what every recorded pass would ask of a model of another depth."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

KINDS = ("first", "window", "refresh")
"""Passes as a table shows them; replays and repeated full passes count as refreshes."""

ROWS_OF_A_TEST = 32
"""Tested rows for which the kernel of ``attention.paged_statistics`` reads a canvas's keys once."""

NEEDED = {"policy", "layers", "canvas", "token_ids", "steps"}
NEEDED_OF_A_PASS = {
    "kind", "rows", "segments", "window", "queries", "attention_stride", "tested", "saved_rows",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecordedPass:
    """A pass of one request: its row in the recording's ``work`` and what of a step it takes."""

    index: int
    num_rows: int
    num_saved_rows: int


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """What a request did, in order.

    Attributes:
        canvas: positions; tokens: of its answer, up to and without the first end token.
    """

    canvas: int
    tokens: int
    passes: list[RecordedPass]


def at_depth(join_layer: int, recorded_layers: int, layers: int) -> int:
    """A recorded join layer at the same relative depth of a model of ``layers`` layers."""
    return min(round(join_layer * layers / recorded_layers), layers - 1)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Requests of a file that ``bench run`` wrote, each with what a replay needs.

    Raises:
        SystemExit: it holds something else, or no passes; names the file and what is lacking.
    """
    try:
        records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        for number, record in enumerate(records, start=1):
            _check(record, number)
        if not any(record["steps"] for record in records):
            raise ValueError("no passes are recorded")
    except ValueError as error:
        raise SystemExit(f"{path}: {error}") from None
    return records


def policies_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """The policies of a file's requests, by name."""
    return sorted({record["policy"] for record in records})


def _check(record: Any, number: int) -> None:
    if not isinstance(record, dict):
        raise ValueError("a line is no JSON object")
    lacking = NEEDED - set(record)
    for entry in record.get("steps", ()):
        lacking |= NEEDED_OF_A_PASS - set(entry)
    if lacking:
        raise ValueError(
            f"record {number} lacks {', '.join(sorted(lacking))}; `bench run` of this version "
            "writes it"
        )


class Columns:
    """Where a pass's work stands in a row of numbers, so that a step's work is their sum.

    Attributes:
        rows: [L] rows at each layer; projected: [L] with the drift test's old queries.
        attended: [L] rows times T; keys: [L] T where the layer has rows.
        window: rows of the last layer and the head; window_attended: times T.
        queries: measured rows times T, summed over layers; query_keys: T, summed over layers.
        tested_keys: T for every ``ROWS_OF_A_TEST`` tested rows, summed over layers.
        requests, measured: 1; 1 where attention statistics are wanted.
        kinds: row-layers, in the column of the pass's kind.
    """

    def __init__(self, layers: int) -> None:
        self.rows, self.projected, self.attended, self.keys = (
            slice(i * layers, (i + 1) * layers) for i in range(4)
        )
        end = 4 * layers
        self.window, self.window_attended, self.queries, self.query_keys = range(end, end + 4)
        self.tested_keys, self.requests, self.measured = range(end + 4, end + 7)
        self.kinds = slice(end + 7, end + 7 + len(KINDS))
        self.count = end + 7 + len(KINDS)


class Recording:
    """Requests of one run file, mapped onto a model of ``layers`` layers.

    Rows, windows and denoising steps are as recorded. Join layers keep their relative depth: a
    row that joined at layer j of n joins at layer j * layers / n, rounded.

    Attributes:
        work: [passes, columns.count] float64.
    """

    def __init__(self, name: str, records: Iterable[dict[str, Any]], layers: int) -> None:
        """
        Args:
            records: of ``read_records``, or of an engine with ``record_rows``.
        """
        self.name = name
        self.layers = layers
        self.columns = Columns(layers)
        self.requests: list[RecordedRequest] = []
        rows: list[Floats] = []
        for record in records:
            passes = []
            for entry in record["steps"]:
                passes.append(RecordedPass(len(rows), entry["rows"], entry["saved_rows"]))
                rows.append(self._work(entry, record["canvas"], record["layers"]))
            tokens = len(record["token_ids"])
            self.requests.append(RecordedRequest(record["canvas"], tokens, passes))
        self.work: Floats = np.array(rows)

    @classmethod
    def read(cls, path: Path, layers: int) -> Recording:
        """A file that ``bench run`` wrote; raises as ``read_records``."""
        records = read_records(path)
        return cls(f"{path.stem} ({', '.join(policies_of(records))})", records, layers)

    @property
    def window(self) -> int:
        """The largest window of any pass."""
        return int(self.work[:, self.columns.window].max())

    def _work(self, entry: dict[str, Any], canvas: int, recorded_layers: int) -> Floats:
        columns, layers = self.columns, self.layers
        work = np.zeros(columns.count)
        for join_layer, count in entry["segments"]:
            work[columns.rows][at_depth(join_layer, recorded_layers, layers) :] += count
        rows = work[columns.rows]
        active = rows > 0
        work[columns.projected] = rows + entry["tested"] * active
        work[columns.attended] = rows * canvas
        work[columns.keys] = active * canvas
        work[columns.window] = entry["window"]
        work[columns.window_attended] = entry["window"] * canvas
        if entry["queries"]:
            measured_layers = int(active[:: -entry["attention_stride"]].sum())
            queries = entry["queries"] + entry["tested"]
            work[columns.queries] = queries * canvas * measured_layers
            work[columns.query_keys] = canvas * measured_layers
            looks = -(-entry["tested"] // ROWS_OF_A_TEST)
            work[columns.tested_keys] = looks * canvas * measured_layers
            work[columns.measured] = 1
        work[columns.requests] = 1
        kind = entry["kind"] if entry["kind"] in KINDS else "refresh"
        work[columns.kinds][KINDS.index(kind)] = rows.sum()
        return work
