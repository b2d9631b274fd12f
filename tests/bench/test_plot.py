# SPDX-License-Identifier: Apache-2.0
"""``bench plot`` on rows as the other benchmarks write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_elastic.bench.__main__ import make_parser

pytest.importorskip("matplotlib")

SPEED = {"gen_length": 256, "prompt_tokens": 140, "batch_size": 1}
ROWS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "settings": (
        [
            {"policy": "none", "work": 1.0, "accuracy": 0.8, "by_task": {}},
            {"policy": "elastic, paper, gamma 0.5", "work": 0.1, "accuracy": 0.7, "by_task": {}},
            {"policy": "elastic, paper, gamma 0.9", "work": 0.2, "accuracy": 0.8, "by_task": {}},
        ],
        ["none", "elastic, paper", "exact match, %"],
    ),
    "compare": (
        [
            {"policy": policy, "tokens_per_second": speed, **SPEED}
            for policy, speed in (("none", 40.0), ("oracle-none", 3.0))
        ],
        ["oracle-none", "batch 1, canvas 256, prompts of 140", "answer tokens a second"],
    ),
    "card": (
        [
            {
                "pass": "window",
                "canvas": 400,
                "batch_size": 16,
                "milliseconds": 3.0,
                "gap_milliseconds": 1.0,
                "times_floor": 1.5,
                "shares": {"products": 0.6, "other": 0.4},
            }
        ],
        ["window, 400 x 16", "products", "multiples of the floor"],
    ),
    "drift": (
        [
            {"quantity": "near", "region": "16", "age": 1, "layer": layer, "value": 0.1 * layer}
            for layer in range(3)
        ],
        ["up to 16", "layer"],
    ),
}


def draw(rows: Any, folder: Path, name: str = "picture.svg") -> Path:
    file, out = folder / "rows.json", folder / name
    file.write_text(json.dumps(rows))
    args = make_parser().parse_args(["plot", str(file), "--out", str(out), "--title", "A title"])
    args.function(args)
    return out


@pytest.mark.parametrize("kind", ROWS)
def test_draws(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")  # text stays text
    rows, expected = ROWS[kind]
    drawn = draw(rows, tmp_path).read_text()
    for words in (*expected, "A title"):
        assert words in drawn
    assert draw(rows, tmp_path, "again.svg").read_text() == drawn, "the same figures"
    assert draw(rows, tmp_path, "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [[], {"rows": 1}, [1], [{"id": "a"}]])
def test_says_what_it_cannot_draw(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"rows\.json: not the --json of"):
        draw(rows, tmp_path)
