# SPDX-License-Identifier: Apache-2.0
"""``bench step``: a whole run at a tiny size, and the operations it counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engines_kept import keep_engines
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.bench.step import PARTS, make_plan, operations


@pytest.mark.engine
def test_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_engines()
    out = tmp_path / "step.json"
    sizes = "--width 64 --heads 2 --layers 4 --mlp 96 --vocabulary 300 --canvas 64 --window 8"
    words = ["step", *sizes.split(), "--batch-size", "1", "3", "--repeats", "1"]
    args = make_parser().parse_args([*words, "--json", str(out)])
    args.function(args)
    rows = json.loads(out.read_text())
    assert [(row["batch_size"], row["pass"]) for row in rows] == [
        (batch, kind)
        for batch in (1, 3)
        for kind in ("full", "window", "window, elastic-block", "from layer 2")
    ]
    for row in rows:
        assert row["milliseconds"] > row["floor_milliseconds"] > 0
        assert set(row["shares"]) == {*PARTS, "other"}
        assert all(row["shares"][part] > 0 for part in PARTS)
    assert [row["rows"] for row in rows if row["pass"] == "full"] == [64, 192]
    assert "| 3 | window |" in capsys.readouterr().out


def test_operations() -> None:
    """Counted by hand: a canvas of 4, a window of 2, two layers of width 3, one head."""
    args = make_parser().parse_args(["step", "--canvas", "4", "--window", "2", "--vocabulary", "7"])
    plan = make_plan("full", 0, 1, 32, args)
    projections = 3 * (2 * 3 * 3)  # query, key and value of a row
    scores = 2 * (2 * 4 * 3)  # over four keys, and the values they weigh
    finish = scores + 2 * 3 * 3 + 3 * (2 * 3 * 5)  # attention, its output, an MLP of 5
    last = 2 * finish  # the window's rows only
    head = 2 * (2 * 3 * 7)
    expected = 2 * 4 * projections + 4 * finish + last + head
    shape = ModelShape(width=3, key_width=3, layers=2, heads=1, mlp=5, vocabulary=7)
    assert operations(shape, plan) == expected
