# SPDX-License-Identifier: Apache-2.0
"""Scores of results, and what the benchmarks make of them; a fake engine answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_elastic.bench import compare, tune
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.problems import accuracy_of, is_right, percent, read_problems, score

PROBLEMS = [{"prompt": "a", "answer": "1 2"}, {"prompt": "b", "answer": "3"}]


def result(text: str, row_layers: int = 10, **other: Any) -> dict[str, Any]:
    """A result whose tokens are the numbers of its text."""
    token_ids = [int(word) for word in text.split()]
    cost = {"denoising_steps": 2, "passes": 3, "row_layers": row_layers}
    return {"text": text, "token_ids": token_ids, "prompt_tokens": 5, **cost, **other}


def test_score() -> None:
    none = [result("1 2", 30), result("4", 60)]
    scored = score(PROBLEMS, [result(" 1  2\n", 20), result("3", 40, passes=4)], none)
    assert (scored.accuracy, scored.agreement) == (1.0, 0.5)
    assert (scored.steps, scored.passes, scored.tokens) == (2.0, 3.5, 3)
    assert (scored.work_per_token, scored.work) == (20.0, pytest.approx(2 / 3))
    assert score(PROBLEMS, none, none).accuracy == 0.5


def test_score_without_baseline() -> None:
    scored = score(PROBLEMS, [result("1 2"), result("3")])
    assert (scored.accuracy, scored.agreement, scored.work) == (1.0, None, None)


@pytest.mark.parametrize("answers", [(None, None), ("1 2", None)])
def test_problems_without_an_answer_have_no_accuracy(answers: Sequence[str | None]) -> None:
    """Not even where some have one: the others would count as wrong."""
    problems = [{"prompt": "a"} | ({"answer": a} if a else {}) for a in answers]
    results = [result("1 2"), result("3")]
    scored = score(problems, results, results)
    assert (scored.accuracy, scored.agreement, scored.work) == (None, 1.0, 1.0)
    assert accuracy_of(problems, results) is None
    with pytest.raises(KeyError):
        is_right(problems[1], results[1])


def test_no_answer_is_not_an_empty_answer() -> None:
    empty = [result("")]
    assert score([{"prompt": "a", "answer": ""}], empty, empty).accuracy == 1.0
    assert score([{"prompt": "a"}], empty, empty).accuracy is None


def test_percent() -> None:
    assert [percent(0.256), percent(0.256, decimals=0), percent(None)] == ["25.6%", "26%", ""]


def test_read_problems_wants_answers(tmp_path: Path) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(p) + "\n" for p in [*PROBLEMS, {"prompt": "c"}]))
    assert read_problems(path, 2) == PROBLEMS
    with pytest.raises(SystemExit, match="needs an 'answer'"):
        read_problems(path)


class FakeEngine:
    """Answers "1 2" and "3"; with Elastic-Cache below gamma 0.8 cheaply and the second wrongly, and
    the same at a frontier below 0.5. A window of 32 is the cheapest."""

    scheduler = SimpleNamespace(max_num_active_reqs=1)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.answer(request) for request in requests]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        right = "1 2" if request["prompt"] == "a" else "3"
        if request["elastic_policy"] == "none":
            return result(right, 100)
        if request.get("elastic_gamma", 0.9) < 0.8:
            return result("1 2", 20)
        if request.get("elastic_commit") == "frontier":
            cost = 40 if request["elastic_window"] == 32 else 45
            loose = request["elastic_frontier_threshold"] < 0.5
            return result("1 2" if loose else right, cost - 5 * loose)
        return result(right, 50)


@pytest.mark.parametrize("has_answers", [True, False])
def test_tune(
    has_answers: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By accuracy or, without answers, by agreement: the same setting here."""
    monkeypatch.setattr(tune, "served_model", FakeEngine)
    lines = PROBLEMS if has_answers else [{"prompt": p["prompt"]} for p in PROBLEMS]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "config.json"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["tune", "--model", "m", "--prompts", str(prompts), "--policies", "elastic"]
    args = make_parser().parse_args([*words, "--out", str(out)])
    args.function(args)
    found = {"policy": "elastic", "statistic": "paper", "track_num": 4, "reach": 4, "gamma": 0.8}
    commits = {"window": 32, "commit": "frontier", "frontier_threshold": 0.5}
    assert json.loads(out.read_text()) == {**found, **commits}
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    setting = "elastic, statistic paper, track_num 4, reach 4, gamma"
    none, wrong = ("100.0%", "50.0%") if has_answers else ("", "")
    assert shown[2] == f"| none | {none} | 100.0% | 3.0 | 1.000 | yes |"
    assert shown[3] == f"| {setting} 0.0 | {wrong} | 50.0% | 3.0 | 0.150 | no |"
    good = [line for line in shown if line.endswith("| 0.500 | yes |")]
    assert good[0] == f"| {setting} 0.8 | {none} | 100.0% | 3.0 | 0.500 | yes |"
    assert len(good) == 11, "each ladder is climbed to its first good rung, and no further"
    setting += " 0.8, window {}, commit frontier, frontier_threshold"
    windows = [
        f"| {setting.format(window)} {threshold}"
        for window in (64, 32, 16)
        for threshold in (0.3, 0.5)
    ]
    grown = f"| {setting.format(32)} 0.5, grow_by 64, grow_ahead 33"
    assert [line.split(" | ")[0] for line in shown if "frontier" in line] == [*windows, grown]


def test_tune_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting would win by its row-layers that takes longer here."""

    class Slow(FakeEngine):
        def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            clock.append(clock[-1] + (6.0 if "elastic_window" in requests[0] else 5.0))
            return super().run(requests)

    clock = [0.0]
    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock[-1])
    baseline = [result("1 2", 100), result("3", 100)]
    bar = tune.Bar(score(PROBLEMS, baseline, baseline), accuracy_loss=0.0, agreement=1.0)
    found = {}
    for cost in tune.COSTS:
        trial = tune.Trial(PROBLEMS, baseline, bar, cost, seconds=10.0)
        found[cost] = tune.find(Slow(), trial, ["elastic"])  # type: ignore[arg-type]
    assert found["seconds"][0] == pytest.approx(0.5) and "window" not in found["seconds"][1]
    assert found["row-layers"][0] == pytest.approx(0.4) and found["row-layers"][1]["window"] == 32


def test_tune_by_seconds_is_warm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What an engine's first run takes longer would make every setting look cheap."""

    class ColdAtFirst(FakeEngine):
        def run(self, requests: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
            clock.append(clock[-1] + (5.0 if clock[1:] else 100.0))
            return super().run(requests)

    clock = [0.0]
    monkeypatch.setattr(tune, "served_model", ColdAtFirst)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: clock[-1])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    words = ["tune", "--model", "m", "--prompts", str(prompts), "--policies", "interval"]
    args = make_parser().parse_args([*words, "--cost", "seconds"])
    args.function(args)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| interval")]
    assert shown and all(line.split(" | ")[4] == "1.000" for line in shown)


@pytest.mark.parametrize("baseline", [True, False])
def test_compare(baseline: bool) -> None:
    policies = ["none", "elastic"] if baseline else ["elastic"]
    words = ["compare", "--model", "m", "--repeats", "1", "--policies", *policies]
    knobs = {"elastic": {"gamma": 0.5}, "fresh": {"policy": "elastic", "gamma": 0.9}}
    args = make_parser().parse_args([*words, "--knobs", json.dumps(knobs)])
    runners = compare.settings(FakeEngine(), args)  # type: ignore[arg-type]
    runners["first"] = lambda problems: runners["elastic"](problems[:1])
    *_, row, fresh, first = compare.compare(runners, PROBLEMS, 2)
    assert (fresh["policy"], fresh["accuracy"]) == ("fresh", 1.0)
    assert (first["problems"], first["accuracy"]) == (1, 1.0)
    assert row.pop("tokens_per_second") > 0
    assert row == {
        "policy": "elastic",
        "prompt_tokens": 5,
        "problems": 2,
        "accuracy": 0.5,
        "agreement": 0.5 if baseline else None,
        "passes": 3,
        "row_layers_per_token": 10,
    }
    line = compare._line({"gen_length": 8, "batch_size": 4, "tokens_per_second": 2.0, **row})
    same = "50%" if baseline else ""
    assert line == f"| elastic | 8 | 5 | 4 | 50.0% | {same} | 3.0 | 10 | 2.0 |"
