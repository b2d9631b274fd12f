# SPDX-License-Identifier: Apache-2.0
"""The study of images: one that spells a text is read as the text is, at the same work."""

from __future__ import annotations

import json
from pathlib import Path

import images
import pytest

from tests.engines_kept import keep_engines

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
QUESTION = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
ANSWER = "fig 91 jet 40 pin 62"
PROMPT = (
    f"<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.engine
def test_an_image_that_spells_a_table(tmp_path: Path) -> None:
    """Read by the trained model, with each policy; it ends where the text is read otherwise."""
    keep_engines()
    prompts, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    prompts.write_text(json.dumps({"id": "a", "prompt": PROMPT, "answer": ANSWER}) + "\n")
    words = ["--model", MODEL, "--prompts", prompts, "--json", figures, "--max-tokens", 32]
    images.main(images.make_parser().parse_args([*map(str, words), "--text", "10"]))
    rows = {row["setting"]: row for row in json.loads(figures.read_text())}
    assert [row["right"] for row in rows.values()] == [1] * len(images.POLICIES)
    exact, block = rows["no cache (`exact`)"], rows["**`block`**"]
    assert exact["image_positions"] == block["image_positions"] > 5
    assert exact["image_passes"] == exact["passes"]
    assert block["of_image"] < exact["of_image"]
