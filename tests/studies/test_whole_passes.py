# SPDX-License-Identifier: Apache-2.0
"""The study of whole passes: it counts those that an engine would replay from one graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import whole_passes

from tests.engine.conftest import MASK, Served, make_engine
from tests.engine.driver import prompt_of
from tests.engine.random_families import save_family
from tests.engine.test_graphed_passes import MOST_REQUESTS, MOST_ROWS, checked
from tests.engines_kept import keep_engines

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
WORDS = ("pin 62 elf 7 fig 91", "ash 18 jet 40", "pin 5 fig 6")


@pytest.mark.engine
@pytest.mark.parametrize("seats", [1, 4])
@pytest.mark.slow
def test_they_are_those_that_graphs_take(seats: int, tmp_path: Path) -> None:
    keep_engines()
    oracle = save_family("illada", tmp_path)
    served = Served("illada", tmp_path, oracle, make_engine(tmp_path))
    engine: Any = served.engine
    asked = [
        {"prompt_token_ids": [t % MASK for t in prompt_of(20 + 9 * index, index)], "max_tokens": 16}
        | {"id": index, "elastic_policy": policy, "elastic_block_drift": 0.5}
        for index, policy in enumerate(["elastic-block", "dual-cache", "elastic", "interval"] * 2)
    ]
    engine.scheduler.max_num_active_reqs = seats
    with checked(served) as executor:
        passes = whole_passes.passes_of(engine, asked)
    whole = [whole_passes.is_one_graph(plans, MOST_ROWS, MOST_REQUESTS) for plans in passes]
    assert executor.passes["whole"] == sum(whole)
    assert executor.passes["not whole"] == len(whole) - sum(whole)
    assert 5 < sum(whole) < len(whole) - 5


@pytest.mark.engine
def test_a_row_for_each_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_engines()
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"Table : {words} . Read fig jet", "max_tokens": 24} for words in WORDS]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", str(MODEL), "--prompts", str(prompts), "--batch-size", "1", "2"]
    whole_passes.main(whole_passes.make_parser().parse_args(words))
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 1", "| 2"]
    assert rows[0][1] == "1.0" and int(rows[0][2]) > int(rows[1][2])
    shares = [int(row[3].split("%")[0]) for row in rows]
    assert 0 <= shares[1] <= shares[0] <= 100 and shares[0]
