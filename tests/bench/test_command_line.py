# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' command lines, as the docs have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented_commands import arguments, documented
from vllm_elastic.bench.__main__ import make_parser

COMMANDS = documented("python -m vllm_elastic.bench")


def test_commands_are_documented() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_understood(command: str) -> None:
    """A reader would type a command that the docs show and get a usage message."""
    assert callable(make_parser().parse_args(arguments(command)).function)


REQUIRED = {
    "run": ["--prompts", "p", "--out", "o"],
    "gamma": ["--problems", "p"],
    "compare": [],
    "tune": ["--prompts", "p"],
}


@pytest.mark.parametrize(
    ("command", "batch_size"), [("run", 1), ("gamma", 16), ("compare", [1, 16]), ("tune", 16)]
)
def test_arguments_of_the_engine(command: str, batch_size: int | list[int]) -> None:
    """The same in every benchmark that builds an engine of a given model."""
    words = [command, "--model", "m/", *REQUIRED[command]]
    args = make_parser().parse_args(words)
    assert (args.model, args.batch_size) == (Path("m"), batch_size)
    assert (args.dtype, args.elastic_config) == ("float32", {})
    words += ["--batch-size", "3", "--dtype", "bfloat16", "--elastic-config", '{"gamma": 0.5}']
    args = make_parser().parse_args(words)
    assert args.batch_size in (3, [3])
    assert (args.dtype, args.elastic_config) == ("bfloat16", {"gamma": 0.5})


@pytest.mark.parametrize("command", REQUIRED)
def test_model_is_required(command: str) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([command, *REQUIRED[command]])
