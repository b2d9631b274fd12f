# SPDX-License-Identifier: Apache-2.0
"""Requests as the docs have them, sent to a server of the test model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from tests.documented_commands import ROOT, blocks, commands
from tests.server.conftest import Client

CURLS = [
    (str(block.page.relative_to(ROOT)), words)
    for block in blocks()
    if block.language == "bash"
    for words in commands(block.text)
    if words[0] == "curl"
]
ANSWERS = {
    "README.md": "fig 91 jet 40 pin 62",
    "docs/recipe-cpu.md": "cow 3 5 elf 4 5 elm 4 4",
    "docs/serving.md": "jet 40 pin 62",
}
WITH_IMAGES = "docs/images.md"  # asks LLaDA-V, with its image left out
WITH_ADAPTERS = "docs/adapters.md"  # tests/server/test_adapters.py


@pytest.mark.parametrize("page", ANSWERS)
def test_curl_is_answered(page: str, client: Client) -> None:
    words = list(dict(CURLS)[page])
    for documented, here in (
        ("localhost:8000", f"127.0.0.1:{client.server.port}"),
        ("examples/tiny_llada/checkpoint", "tiny"),
    ):
        assert any(documented in word for word in words)
        words = [word.replace(documented, here) for word in words]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ran.stdout)["choices"][0]["message"]["content"].strip() == ANSWERS[page]


def test_all_curls_are_known() -> None:
    assert sorted(page for page, _ in CURLS) == sorted([*ANSWERS, WITH_IMAGES, WITH_ADAPTERS])
    words = dict(CURLS)[WITH_IMAGES]
    body = json.loads(words[words.index("-d") + 1])
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"]


def test_readme_says_what_the_answer_is() -> None:
    assert f"answers `{ANSWERS['README.md']}`" in (ROOT / "README.md").read_text()


def test_stream_example(client: Client) -> None:
    """The line in examples/ray_serve/README.md, at this server."""
    (words,) = (
        words
        for block in blocks([ROOT / "examples" / "ray_serve" / "README.md"])
        for words in commands(block.text)
        if words[:2] == ["python", "../stream.py"]
    )
    assert words[2:] == ["http://localhost:8000/v1"], shlex.join(words)
    script, url = ROOT / "examples" / "stream.py", f"{client.server.url}/v1"
    ran = subprocess.run(
        [sys.executable, script, url], capture_output=True, text=True, check=True, timeout=120
    )
    assert re.sub(r"\s+", " ", ran.stdout).strip() == ANSWERS["README.md"]
