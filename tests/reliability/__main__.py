# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.reliability COMMAND``: a server under load, and under bad requests."""

from __future__ import annotations

import argparse

from tests.reliability import fuzz, soak


def make_parser() -> argparse.ArgumentParser:
    """The command line of both; ``function`` is what to call."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (soak, fuzz):
        command.add_parser(commands)
    return parser


def main() -> None:
    """Parse the command line and run one of them."""
    args = make_parser().parse_args()
    try:
        args.function(args)
    except FileNotFoundError as error:
        raise SystemExit(f"{args.command}: {error}") from None


if __name__ == "__main__":
    main()
