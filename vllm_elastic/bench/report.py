# SPDX-License-Identifier: Apache-2.0
"""``bench report``: recorded runs as one page that replays them, pass by pass."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_elastic.decoding.record import BOUNDS
from vllm_elastic.page import self_contained

NEEDED = (
    "id", "policy", "layers", "canvas", "prompt_tokens", "token_ids", "denoising_steps", "passes",
    "row_layers", "full_row_layers", "seconds", "steps", "knobs", "prompt_token_ids", "words",
)  # fmt: skip
COPIED = (
    "setting", "policy", "layers", "canvas", "prompt_tokens", "denoising_steps", "passes",
    "row_layers", "full_row_layers",
)  # fmt: skip
PASS = (
    "denoising_step", "kind", "start_layer", "rows", "committed", "similarities", "canvas",
)  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add ``report`` to the command line."""
    parser = commands.add_parser(
        "report",
        help="a page that replays what `run --canvas` recorded, settings side by side",
        description="One HTML page, without network: canvases, blocks and work of every pass. "
        "Records of the same id are shown together, each under its `setting`, or the name of its "
        "file. The last setting is what the answers of the others are compared with.",
    )
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN.jsonl", help="what `bench run --canvas` wrote"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help=".html")
    parser.set_defaults(function=main)


def main(args: argparse.Namespace) -> None:
    """Read the records and write the page."""
    records = [record for path in args.runs for record in read_records(path)]
    args.out.write_text(page(records))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a run file, each with the ``setting`` that it is shown under.

    Raises:
        SystemExit: a record lacks what the page shows; names file, line and remedy.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}:{number}: not JSON: {error}") from None
        lacking = set(NEEDED) - set(record) if isinstance(record, dict) else set(NEEDED)
        if lacking:
            raise SystemExit(
                f"{path}:{number}: lacks {', '.join(sorted(lacking))}; `bench run --canvas` of "
                "this version writes it"
            )
        records.append({"setting": path.stem, **record})
    return records


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page for records of ``read_records``.

    Raises:
        SystemExit: there are none, or two of one request under one setting.
    """
    if not records:
        raise SystemExit("report: no records")
    by_id: dict[Any, list[dict[str, Any]]] = {}
    for record in records:
        by_id.setdefault(record["id"], []).append(record)
    return self_contained(
        "report", {"requests": [_request(name, runs) for name, runs in by_id.items()]}
    )


def _request(name: Any, records: list[dict[str, Any]]) -> dict[str, Any]:
    settings = [record["setting"] for record in records]
    for setting in settings:
        if settings.count(setting) > 1:
            raise SystemExit(
                f"report: request {name!r} is there twice as {setting!r}; give every setting a "
                "file, and every request an id"
            )
    words = {token_id: word for record in records for token_id, word in record["words"].items()}
    prompts = {tuple(record["prompt_token_ids"]) for record in records}
    if len(prompts) > 1:
        raise SystemExit(f"report: the records of request {name!r} have different prompts")
    return {
        "id": name,
        "prompt": [words[str(token_id)] for token_id in prompts.pop()],
        "words": words,
        "runs": [_run(record) for record in records],
    }


def _run(record: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: record[name] for name in COPIED},
        "seconds": round(record["seconds"], 4),
        "tokens": len(record["token_ids"]),
        "answer": " ".join(map(str, record["token_ids"])),
        "given": _given(record),
        "knobs": {name: record["knobs"][name] for name in BOUNDS},
        "steps": [
            {name: entry[name] for name in PASS if name in entry} for entry in record["steps"]
        ],
    }


def _given(record: dict[str, Any]) -> list[list[int]]:
    """Answer positions that nothing committed: the request fixed them."""
    committed = _committed(record["steps"])
    answer = enumerate(record["token_ids"], start=record["prompt_tokens"])
    return [[position, token_id] for position, token_id in answer if position not in committed]


def _committed(steps: Iterable[dict[str, Any]]) -> set[int]:
    return {position for entry in steps for position in entry["committed"]}
