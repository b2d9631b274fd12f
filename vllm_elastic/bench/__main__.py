# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_elastic.bench COMMAND``."""

from __future__ import annotations

import argparse
import os

from vllm_elastic.bench import (
    card,
    compare,
    plan,
    plot,
    replay,
    report,
    run,
    settings,
    simulate,
    tune,
)
from vllm_elastic.bench.arguments import prepare_outputs
from vllm_elastic.config import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """The command line of all benchmarks; ``function`` is what to call."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_elastic.bench",
        description="Run a masked diffusion model on prompts of your own and see what it costs; "
        "COMMAND --help says more. run, settings, compare and tune load it in this process.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (run, settings, compare, tune, card, replay, simulate, plan, plot, report):
        command.add_parser(commands)
    return parser


def main() -> None:
    """Parse the command line and run one benchmark."""
    args = make_parser().parse_args()
    # The table alone on standard output.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    prepare_outputs(args)
    try:
        args.function(args)
    except (ConfigError, FileNotFoundError) as error:
        raise SystemExit(f"{args.command}: {error}") from None


if __name__ == "__main__":
    main()
