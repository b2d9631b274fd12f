# SPDX-License-Identifier: Apache-2.0
"""Pages that people open: HTML, style sheet and scripts in this folder, joined to one file each.

A page's HTML names the files beside it as any HTML does. ``self_contained`` puts their contents in
their place, so that what is sent or saved needs no other file and no network.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

_STYLE = re.compile(r'<link rel="stylesheet" href="([\w./-]+)">')
_SCRIPT = re.compile(r'<script src="([\w./-]+)"></script>')
_DATA = '<script id="data" type="application/json"></script>'


def self_contained(name: str, data: Any) -> str:
    """The page ``name``.html with its style, its scripts and ``data`` (plain JSON values) in it."""
    html = (FOLDER / f"{name}.html").read_text()
    html = _STYLE.sub(lambda found: f"<style>\n{_text(found[1])}</style>", html)
    html = _SCRIPT.sub(lambda found: f"<script>\n{_text(found[1])}</script>", html)
    # What the data says must not end the element that it is in.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return html.replace(_DATA, _DATA.replace("><", f">{text}<"))


def _text(file: str) -> str:
    return (FOLDER / file).read_text()
