# SPDX-License-Identifier: Apache-2.0
"""``bench run``: prompts in, one record a request out."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_elastic.bench.arguments import (
    add_adapter,
    add_count,
    add_engine,
    add_model,
    add_prompts,
    positive,
)
from vllm_elastic.bench.engine import DEFAULT_ROW_BUDGET
from vllm_elastic.bench.served_model import served_model


def add_parser(commands: Any) -> None:
    """Add ``run`` to the command line."""
    parser = commands.add_parser(
        "run",
        help="run prompts through the engine and write a record of every request",
        description="Reads JSONL (id, prompt or prompt_token_ids, optional max_tokens and "
        "elastic_* knobs) and writes one JSON line a request: the answer and what it cost.",
    )
    add_model(parser)
    add_prompts(parser)
    add_count(parser, "prompts")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    add_engine(parser, batch_size=1)
    add_adapter(parser)
    parser.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        default=DEFAULT_ROW_BUDGET,
        metavar="N",
        help="row budget of a step (default: %(default)s)",
    )
    parser.add_argument(
        "--similarities", action="store_true", help="record each drift test's similarities"
    )
    parser.add_argument(
        "--canvas",
        action="store_true",
        help="record what `bench report` shows: predictions, recomputed rows, stale blocks",
    )
    parser.set_defaults(function=main)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Requests of a file.

    Raises:
        SystemExit: a line is not a JSON object with a prompt, or there is none; names file and
            line.
    """
    found = False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise SystemExit(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(request, dict) or not {"prompt", "prompt_token_ids"} & set(request):
            raise SystemExit(f"{path}:{number}: needs 'prompt' or 'prompt_token_ids'")
        if not (request.get("prompt_token_ids") or request.get("prompt")):
            raise SystemExit(f"{path}:{number}: the prompt is empty")
        length = request.get("max_tokens")
        if length is not None and not (type(length) is int and length > 0):
            raise SystemExit(
                f"{path}:{number}: max_tokens must be a whole number from 1, got {length!r}"
            )
        found = True
        yield request
    if not found:
        raise SystemExit(f"{path}: has no prompt; write one JSON object with a 'prompt' a line")


def main(args: argparse.Namespace) -> None:
    """Run the prompts; records go to ``--out``, a summary to standard error."""
    requests = list(read_jsonl(args.prompts))[: args.count]
    engine = served_model(
        args,
        requests,
        adapter=args.adapter,
        row_budget=args.max_num_batched_tokens,
        similarities=args.similarities,
        rows=True,
        canvas=args.canvas,
    )
    started = time.perf_counter()
    results = engine.run(requests)
    seconds = time.perf_counter() - started
    with args.out.open("w") as out:
        for result in results:
            out.write(json.dumps(result) + "\n")
    print(summary(results, seconds), file=sys.stderr)


def summary(results: list[dict[str, Any]], seconds: float) -> str:
    """One line: requests, tokens, passes, work relative to no cache, tokens per second."""
    tokens = sum(len(result["token_ids"]) for result in results)
    passes = sum(result["passes"] for result in results)
    row_layers = sum(result["row_layers"] for result in results)
    full = sum(result["full_row_layers"] for result in results)
    return (
        f"{len(results)} requests, {tokens} tokens, {passes} passes, "
        f"{row_layers / max(full, 1):.3f} of the row-layers without a cache, "
        f"{tokens / seconds:.1f} tokens/s"
    )
