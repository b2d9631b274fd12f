# SPDX-License-Identifier: Apache-2.0
"""Arguments that several benchmarks have; each is added where its help should stand."""

from __future__ import annotations

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from vllm_elastic.config import knobs_of


def add_model(parser: ArgumentParser) -> None:
    """``--model``: a checkpoint's directory."""
    parser.add_argument("--model", required=True, type=Path, metavar="DIR")


def add_prompts(parser: ArgumentParser) -> None:
    """``--prompts``: what ``read_jsonl`` reads."""
    parser.add_argument("--prompts", required=True, type=Path, metavar="FILE")


def add_engine(parser: ArgumentParser, batch_size: int | None = None) -> None:
    """What ``served_model`` makes an engine of: batch size, type, knobs, canvas, cache.

    Args:
        batch_size: the default, in requests; None: the benchmark has a ``--batch-size`` of its own.
    """
    if batch_size is not None:
        parser.add_argument("--batch-size", type=positive, default=batch_size, metavar="N")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto, the default: what a server takes for this checkpoint",
    )
    parser.add_argument("--elastic-config", type=knobs_of, default={}, metavar="JSON")
    parser.add_argument(
        "--max-model-len",
        type=positive,
        default=None,
        metavar="N",
        help="positions of a canvas, prompt and answer (default: of the longest that is asked for)",
    )
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=positive,
        default=None,
        metavar="N",
        help="keys, values and hidden states of all canvases (default: on a GPU what vLLM finds "
        "free, elsewhere what a batch of them takes, and at least 1 GiB)",
    )


def add_adapter(parser: ArgumentParser) -> None:
    """``--adapter`` of a ``BenchEngine``."""
    parser.add_argument(
        "--adapter",
        type=Path,
        default=None,
        metavar="DIR",
        help="a LoRA adapter, as PEFT writes it, that all requests are for",
    )


def add_json(parser: ArgumentParser) -> None:
    """``--json``: a file for the figures that are printed."""
    parser.add_argument("--json", type=Path, default=None, metavar="FILE")


def add_count(parser: ArgumentParser, what: str) -> None:
    """``--count``: so many of ``what``, from the first one on."""
    parser.add_argument("--count", type=positive, default=None, metavar="N", help=f"first N {what}")


def prepare_outputs(args: Namespace) -> None:
    """Make the folders of ``--out`` and ``--json`` before the work that would be lost.

    Raises:
        SystemExit: a file cannot be written there; names the argument.
    """
    for name in ("out", "json"):
        path: Path | None = getattr(args, name, None)
        if path is None:
            continue
        if path.is_dir():
            raise SystemExit(f"{args.command}: --{name}: {path} is a folder; name a file in it")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SystemExit(f"{args.command}: --{name}: {error}") from None


def named_knobs(text: str) -> dict[str, dict[str, Any]]:
    """A type of argument: a JSON object of what ``--elastic-config`` takes, by name."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ArgumentTypeError(f"must be a JSON object of knobs by name, got {text!r}")
    return {name: knobs_of(json.dumps(knobs)) for name, knobs in values.items()}


def positive(text: str) -> int:
    """A type of argument: a whole number from 1."""
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)
