# SPDX-License-Identifier: Apache-2.0
"""Commands as the docs have them. A reader who types one should get no usage message."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("docs/*.md"),
    ROOT / "README.md",
    *ROOT.glob("examples/*/README.md"),
]


def documented(program: str, pages: Sequence[Path] = PAGES) -> list[str]:
    """Every ``program ...`` in a code block, continued lines joined, without ``program``."""
    lines = []
    for page in pages:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.M | re.S):
            lines += block.replace("\\\n", " ").splitlines()
    return [line.split(f"{program} ", 1)[1] for line in lines if f"{program} " in line]


def arguments(command: str) -> list[str]:
    """What the program itself gets of such a line."""
    words = [word for word in shlex.split(command, comments=True) if word != "&"]
    return words[: words.index(">")] if ">" in words else words
