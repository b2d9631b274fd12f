# SPDX-License-Identifier: Apache-2.0
"""The study of the host's time: the very steps of the requests, and none of the device's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import host_time
import pytest

from tests.engines_kept import keep_engines
from vllm_elastic.runner.executor import CompiledExecutor, EagerExecutor

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
WORDS = ("pin 62 elf 7 fig 91", "ash 18 jet 40", "pin 5 fig 6")


@pytest.mark.engine
def test_steps_are_replayed_without_a_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A pass in a replay would be counted as the host's, or a step be compared with another."""
    keep_engines()
    passes = 0

    def counted(run: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            nonlocal passes
            passes += 1
            return run(*args)

        return wrapper

    for executor in (EagerExecutor, CompiledExecutor):
        monkeypatch.setattr(executor, "run", counted(executor.run))
    steps: list[int] = []
    results = host_time._results

    def noted(*args: Any) -> Any:
        kept = results(*args)
        steps.append(len(kept))
        return kept

    monkeypatch.setattr(host_time, "_results", noted)
    prompts, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
    lines = [{"prompt": f"Table : {words} . Read fig jet", "max_tokens": 24} for words in WORDS]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--model", MODEL, "--prompts", prompts, "--json", figures]
    words += ["--batch-size", 1, 3, "--repeats", 2]
    host_time.main(host_time.make_parser().parse_args(list(map(str, words))))
    assert passes == sum(steps) and len(steps) == 2 and steps[0] > steps[1] > 3
    alone, together = json.loads(figures.read_text())
    assert (alone["seats"], together["seats"]) == (1, 3)
    assert alone["requests"] == 1 < together["requests"] <= 3
    for row in (alone, together):
        parts = [row[part] for part in host_time.PARTS]
        assert min(parts) > 0 and row["together"] == pytest.approx(sum(parts))
    shown = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in shown if line.startswith("| ")][1:] == ["| 1 |", "| 3 |"]
