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
