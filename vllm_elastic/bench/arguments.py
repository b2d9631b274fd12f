# SPDX-License-Identifier: Apache-2.0
"""Arguments that several benchmarks have; each is added where its help should stand."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path


def add_model(parser: ArgumentParser) -> None:
    """``--model``: a checkpoint's directory."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")


def add_prompts(parser: ArgumentParser) -> None:
    """``--prompts``: what ``read_jsonl`` reads."""
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")


def add_engine(parser: ArgumentParser, batch_size: int | None = None) -> None:
    """``--batch-size``, ``--dtype`` and ``--elastic-config`` of a ``BenchEngine``.

    Args:
        batch_size: the default, in requests; None: the benchmark has a ``--batch-size`` of its own.
    """
    if batch_size is not None:
        parser.add_argument("--batch-size", type=int, default=batch_size, metavar="N")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--elastic-config", type=json.loads, default={}, metavar="JSON")


def add_json(parser: ArgumentParser) -> None:
    """``--json``: a file for the figures that are printed."""
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")


def positive(text: str) -> int:
    """A type of argument: a whole number from 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)
