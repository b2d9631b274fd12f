# SPDX-License-Identifier: Apache-2.0
"""What no file of the repository may hold."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("vllm_elastic", "tests", "examples", "docs", "patches", "scripts", ".ci")
TEXTS = {".py", ".md", ".toml", ".txt", ".yml", ".yaml", ".json", ".sh", ".js", ".css", ".html", ""}
MARK = re.compile(r"^(<{7}|>{7}) ", re.M)


def test_no_merge_left_its_marks() -> None:
    """In a string, a page or a data file nothing else would see them: a user would, in --help."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = [path for path in files if path.suffix in TEXTS and "__pycache__" not in path.parts]
    assert len(texts) > 300
    marked = [path for path in texts if MARK.search(path.read_text(errors="replace"))]
    assert not marked
