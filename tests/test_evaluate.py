# SPDX-License-Identifier: Apache-2.0
"""The evaluation recipe: its knobs, its table, and a whole run where the harness is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.config import ElasticConfig

ROOT = Path(__file__).resolve().parents[1]
EVALUATE = ROOT / "examples" / "evaluate"
TINY = ROOT / "examples" / "tiny_llada"


@pytest.fixture
def evaluate() -> Iterator[ModuleType]:
    sys.path.insert(0, str(EVALUATE))
    try:
        import evaluate

        yield evaluate
    finally:
        sys.path.remove(str(EVALUATE))
        for name in ("evaluate", "recipes"):
            sys.modules.pop(name, None)


def test_every_setting_of_every_recipe_is_one_that_a_request_may_have(
    evaluate: ModuleType,
) -> None:
    for recipes in evaluate.RECIPES.values():
        for recipe in recipes.values():
            for setting in evaluate.SETTINGS.values():
                ElasticConfig().for_request({**recipe.knobs, **setting})


def test_the_table_has_what_ran_and_what_others_report(evaluate: ModuleType) -> None:
    ran = evaluate.Outcome("block", 50.0, 4, 400, 100, 8000, 20.0, 10.0)
    published = evaluate.RECIPES["llada-1.5"]["gsm8k"].published
    rows = evaluate.table([ran], published).splitlines()[2:]
    assert rows[0] == "| block | 50.00% | 100.0 | 20.0 | 40.0 | 4.00 | 20 |"
    assert rows[3] == "| *reported: Elastic-Cache* | 82.79% | | 41.7 | | | |"


def test_a_relative_out_is_where_the_reader_stands(
    evaluate: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outcomes would lie among the tasks, whose folder the harness works in."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "TASKS", tasks)
    ran = evaluate.Outcome("block", 50.0, 4, 400, 100, 8000, 20.0, 10.0)
    monkeypatch.setattr(evaluate, "run", lambda *_: ran)
    words = ["evaluate.py", "tiny", "tiny", "--settings", "block", "--out", "results.json"]
    monkeypatch.setattr(sys, "argv", words)
    evaluate.main()
    (outcome,) = json.loads((tmp_path / "results.json").read_text())
    assert outcome["setting"] == "block" and not list(tasks.iterdir())


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(900)
def test_the_test_models_task(tmp_path: Path) -> None:
    """With the harness's own Python in LM_EVAL_PYTHON, as the recipe's README makes it."""
    python = os.environ.get("LM_EVAL_PYTHON")
    if python is None:
        pytest.skip("LM_EVAL_PYTHON names no environment with lm-evaluation-harness")
    write = [sys.executable, str(TINY / "heldout.py"), str(EVALUATE / "tasks"), "--count", "10"]
    subprocess.run(write, check=True)
    options = ["--kv-cache-memory-bytes", "300000000", "--max-model-len", "1024"]
    with ServerProcess(TINY / "checkpoint", options, log=tmp_path / "log") as server:
        command = [python, str(EVALUATE / "evaluate.py"), "tiny", "tiny", "--server", server.url]
        command += ["--settings", "block", "--out", str(tmp_path / "out.json")]
        subprocess.run(command, check=True, timeout=600)
    (outcome,) = json.loads((tmp_path / "out.json").read_text())
    assert outcome["requests"] == 10 and outcome["accuracy"] >= 80
    assert 0 < outcome["steps"] < outcome["tokens"], "several tokens a step"
