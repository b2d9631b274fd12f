# SPDX-License-Identifier: Apache-2.0
"""Links of all pages, and how long the two are that everybody reads."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    page
    for pattern in ("*.md", "docs/**/*.md", "patches/**/*.md", "examples/**/*.md")
    for page in sorted(ROOT.glob(pattern))
]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What headings and named places of a page are called, as GitHub makes it of their text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return {*plain, *re.findall(r'<a id="([^"]+)">', text)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """A reader would be sent to a page, or a place in one, that was moved."""
    broken = []
    for link in LINK.findall(page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        known = target.suffix != ".md" or not anchor or anchor in anchors(target)
        if not target.exists() or not known:
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(("name", "most"), [("README.md", 900), ("docs/benchmarks.md", 1500)])
def test_what_everybody_reads_is_short(name: str, most: int) -> None:
    """They would become lab notebooks again."""
    assert len((ROOT / name).read_text().split()) <= most


def test_the_site_is_built_without_a_warning() -> None:
    """Links, anchors and the table of contents, as the site has them."""
    built = subprocess.run(
        ["bash", str(ROOT / "scripts" / "docs.sh"), sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert (ROOT / "out" / "docs" / "site" / "docs" / "design" / "index.html").exists()
