# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' command lines, as the docs have them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vllm_elastic.bench.__main__ import make_parser

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("docs/*.md"),
    ROOT / "README.md",
    ROOT / "examples" / "tiny_llada" / "README.md",
]


def documented() -> list[str]:
    """Every `python -m vllm_elastic.bench ...` in a code block, continued lines joined."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            lines += block.replace("\\\n", " ").splitlines()
    start = "python -m vllm_elastic.bench "
    return [line.split(start, 1)[1] for line in lines if start in line]


def test_commands_are_documented() -> None:
    assert len(documented()) >= 3


@pytest.mark.parametrize("command", documented())
def test_documented_command_is_understood(command: str) -> None:
    """A reader would type a command that the docs show and get a usage message."""
    words = shlex.split(command, comments=True)
    words = [word for word in words if word not in ("&",)]
    if ">" in words:
        words = words[: words.index(">")]
    assert callable(make_parser().parse_args(words).function)


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
