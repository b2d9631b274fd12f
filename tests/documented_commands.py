# SPDX-License-Identifier: Apache-2.0
"""Code blocks and commands as the docs have them. A reader who types one should get no usage
message."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
]
_BLOCK = re.compile(r"^( *)```(\S*)\n(.*?)^\1```$", re.M | re.S)
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Block:
    """A fenced code block; those of lists, which are indented, too."""

    page: Path
    language: str
    text: str


def blocks(pages: Sequence[Path] = PAGES) -> list[Block]:
    """Every code block, in the order of the pages."""
    return [
        Block(page, language, textwrap.dedent(text))
        for page in pages
        for _, language, text in _BLOCK.findall(page.read_text())
    ]


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments, assignments before it, and &.

    Raises:
        ValueError: a quotation is not closed.
    """
    open_lines = ""
    for line in script.replace("\\\n", " ").splitlines():
        open_lines += line
        try:
            words = shlex.split(open_lines, comments=True)
        except ValueError:  # a quotation goes on in the next line
            open_lines += "\n"
            continue
        open_lines = ""
        while words:
            stop = words.index("&&") if "&&" in words else len(words)
            command, words = words[:stop], words[stop + 1 :]
            while len(command) > 1 and _ASSIGNMENT.match(command[0]):
                command = command[1:]
            if command[-1:] == ["&"]:
                command = command[:-1]
            yield command
    if open_lines:
        raise ValueError(f"not closed: {open_lines}")


def documented(program: str, pages: Sequence[Path] = PAGES) -> list[str]:
    """Every ``program ...`` in a code block, continued lines joined, without ``program``."""
    lines = []
    for block in blocks(pages):
        lines += block.text.replace("\\\n", " ").splitlines()
    return [line.split(f"{program} ", 1)[1] for line in lines if f"{program} " in line]


def arguments(command: str) -> list[str]:
    """What the program itself gets of such a line."""
    words = [word for word in shlex.split(command, comments=True) if word != "&"]
    return words[: words.index(">")] if ">" in words else words
