# SPDX-License-Identifier: Apache-2.0
"""``compare``, ``tune`` and ``settings`` from command line to file, on the trained model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines_kept import keep_engines
from vllm_elastic.bench import tune
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.policies import POLICIES

pytestmark = pytest.mark.engine

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada"
SERVED = ("--model", str(TINY / "checkpoint"), "--dtype", "float32")
CANVAS = 40

ROW = {
    "policy": str,
    "gen_length": int,
    "prompt_tokens": int,
    "batch_size": int,
    "problems": int,
    "accuracy": float,
    "agreement": float,
    "passes": float,
    "row_layers_per_token": float,
    "tokens_per_second": float,
}


@pytest.fixture(autouse=True)
def modules_as_before() -> Iterator[None]:
    """The problem generator's modules have names that others may want."""
    keep_engines()
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name in ("heldout", "tasks", "tokenizer", "words"):
            del sys.modules[name]


def run(*words: str) -> None:
    args = make_parser().parse_args(list(words))
    args.function(args)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """Two questions whose canvas is too short for the answer: all there is to compare is tokens."""
    sys.path.insert(0, str(TINY))
    try:
        import heldout

        records = list(heldout.records(11, 2, None))
    finally:
        sys.path.remove(str(TINY))
    path = tmp_path / "problems.jsonl"
    lines = [json.dumps({**record, "max_tokens": CANVAS}) for record in records]
    path.write_text("\n".join(lines))
    return path


@pytest.mark.slow
def test_compare_writes_a_row_for_each_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    chosen = ["none", "elastic-block"]
    knobs = {"as published": {"policy": "elastic", "reach": 0}, "elastic-block": {"reach": 2}}
    words = ["--policies", *chosen, "--problems", "3", "--gen-length", str(CANVAS), "--shots", "0"]
    words += ["--batch-size", "1", "2", "--repeats", "2", "--oracle-problems", "1"]
    run("compare", *SERVED, *words, "--knobs", json.dumps(knobs), "--json", str(out))
    rows: list[dict[str, Any]] = json.loads(out.read_text())
    settings = [*chosen, "as published"]
    names = [(row["policy"], row["batch_size"]) for row in rows]
    oracles = [("oracle-none", 1), ("oracle-elastic", 1)]
    assert names == [(n, 1) for n in settings] + oracles + [(n, 2) for n in settings]
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == ROW
        assert row["gen_length"] == CANVAS and row["tokens_per_second"] > 0
        assert row["problems"] == (1 if row["policy"] in dict(oracles) else 3)
    by_name = {(row["policy"], row["batch_size"]): row for row in rows}
    none = by_name["none", 1]
    assert none["agreement"] == 1.0 and by_name["oracle-none", 1]["agreement"] == 1.0
    # Work and answers do not depend on the batch.
    for key in ("row_layers_per_token", "passes", "agreement"):
        assert by_name["elastic-block", 1][key] == by_name["elastic-block", 2][key]
    block = by_name["elastic-block", 1]
    assert block["row_layers_per_token"] < none["row_layers_per_token"] / 2
    assert capsys.readouterr().out.count("\n|") >= len(rows)


def test_compare_knows_every_policy() -> None:
    args = make_parser().parse_args(["compare", *SERVED])
    assert args.policies == list(POLICIES)


@pytest.mark.parametrize("agreement", ["1.0", pytest.param("0.0", marks=pytest.mark.slow)])
def test_tune_finds_the_cheapest_that_agrees(
    agreement: str, problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"  # no references: judged by agreement
    lines = [json.loads(line) for line in problems.read_text().splitlines()]
    kept = [{key: line[key] for key in ("id", "prompt", "max_tokens")} for line in lines]
    prompts.write_text("\n".join(json.dumps(line) for line in kept))
    out = tmp_path / "found.json"
    words = ["--policies", "elastic-block", "interval", "--agreement", agreement]
    words += ["--elastic-config", '{"reach": 3}', "--out", str(out)]
    run("tune", *SERVED, "--prompts", str(prompts), *words)
    found = json.loads(out.read_text())
    assert ElasticConfig.from_dict(found).reach == 3, "the user's own knobs are kept"
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if " | " in line]
    tried = {row[0]: (float(row[4]), row[5]) for row in rows[1:]}
    good = {name: work for name, (work, verdict) in tried.items() if verdict == "yes"}
    name = tune._name({key: value for key, value in found.items() if key != "reach"})
    assert good["none" if name == tune._name(tune.BASELINE) else name] == min(good.values())
    if agreement == "0.0":  # the first rungs are good enough, and the cheapest
        assert found["policy"] in ("elastic-block", "interval")
        knob = {"elastic-block": "block_drift", "interval": "interval"}[found["policy"]]
        firsts = [ladder.values[0] for ladders in tune.LADDERS.values() for ladder in ladders]
        assert found[knob] in firsts
        assert found.get("frontier_threshold", 0.3) == 0.3


def test_tune_checks_on_prompts_kept_aside(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    words = ["--policies", "interval", "--check-share", "0.5", "--out", str(out)]
    run("tune", *SERVED, "--prompts", str(problems), *words)
    chosen, checked = capsys.readouterr().out.split("it was not chosen by")
    # vLLM's log is in between, unless it is told otherwise as main() does.
    assert "1 prompts to choose by; good enough: an accuracy of at least" in chosen
    assert chosen.rstrip().endswith("On the 1 prompts")
    tables = [
        [line for line in part.splitlines() if line.startswith("| ")] for part in (chosen, checked)
    ]
    assert len(tables[1]) == 3, "heads, none, what was found"
    name = tune._name(json.loads(out.read_text()))
    assert any(line.startswith(f"| {name} |") for line in tables[0])
    assert tables[1][-1].startswith(f"| {name} |")


def test_tune_says_when_the_check_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that agrees on what chose it and not on what was kept aside."""

    class Engine:
        def run(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            numbers = {"denoising_steps": 1, "passes": 1, "row_layers": 1}
            return [{"token_ids": [request["max_tokens"]], **numbers} for request in requests]

    def trial(answers: list[int]) -> tune.Trial:
        prompts = [{"prompt": "", "max_tokens": 1} for _ in answers]
        none = [{"token_ids": [a], "denoising_steps": 1, "passes": 1, "row_layers": 9}
                for a in answers]  # fmt: skip
        bar = tune.Bar(tune.score(prompts, none, none), 1.0, 0.9)
        return tune.Trial(prompts, none, bar, cost="row-layers", seconds=1.0)

    engine: Any = Engine()
    work, best = tune.find(engine, trial([1, 1]), ["interval"])
    assert work == pytest.approx(1 / 9) and best == {"policy": "interval", "interval": 64}
    tune.check(engine, trial([1, 1]), best)
    assert "Not good enough" not in capsys.readouterr().out
    tune.check(engine, trial([1, 2]), best)
    assert "Not good enough there (one prompt is 50.0 points)" in capsys.readouterr().out
    assert tune.find(engine, trial([2, 2]), ["interval"])[1] == tune.BASELINE


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(80, 0.25, 20), (2, 0.25, 0), (1, 0.9, 0)]
)
def test_tune_keeps_some_prompts_aside(count: int, share: float, expected: int) -> None:
    aside = tune.kept_aside(count, share)
    assert len(aside) == expected and aside <= set(range(count))
    assert aside == tune.kept_aside(count, share), "the same in every run"


def test_tune_tries_the_elastic_that_suits_the_tiny_model() -> None:
    recommended = {"policy": "elastic", "statistic": "paper", "track_num": 4, "reach": 4}
    recommended["gamma"] = 0.9
    tried = [
        {"policy": policy, **setting}
        for policy, ladders in tune.LADDERS.items()
        for ladder in ladders
        for setting in ladder
    ]
    assert recommended in tried
    tried += [setting for policy in POLICIES for rule in tune.decoding(policy) for setting in rule]
    assert all(ElasticConfig.from_dict(setting) for setting in tried)


def test_settings_prints_policies_and_tasks(
    problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "settings.json"
    words = ["--statistics", "paper", "--gammas", "0", "0.9", "--policies", "dual-cache"]
    words += ["--configs", '{"policy": "elastic-block"}', "--json", str(out)]
    run("settings", *SERVED, "--problems", str(problems), *words)
    rows = json.loads(out.read_text())
    assert len(rows) == 5, "none, two gammas, a policy and a config"
    printed = capsys.readouterr().out
    assert printed.count("elastic-block") >= 1 and "dual-cache" in printed
    works = [row["work"] for row in rows]
    assert works[0] == 1.0 and max(works[1:]) < 0.6


def test_run_records_what_report_shows(problems: Path, tmp_path: Path) -> None:
    """From prompts to a page; every number of it is in the records, words and all."""
    files = []
    for setting in ("block", "exact"):
        files.append(str(tmp_path / f"{setting}.jsonl"))
        config = json.dumps({"preset": setting})
        words = ["--prompts", str(problems), "--elastic-config", config, "--canvas"]
        run("run", *SERVED, *words, "--out", files[-1])
    out = tmp_path / "report.html"
    run("report", *files, "--out", str(out))
    (embedded,) = re.findall(
        r'<script id="data" type="application/json">(.*?)</script>', out.read_text(), re.S
    )
    requests = json.loads(embedded)["requests"]
    asked = [json.loads(line) for line in problems.read_text().splitlines()]
    assert [request["id"] for request in requests] == [line["id"] for line in asked]
    for request, line in zip(requests, asked, strict=True):
        # A token alone is decoded without the space before it.
        assert "".join(request["prompt"]).split() == ["".join(line["prompt"].split())]
        assert [made["setting"] for made in request["runs"]] == ["block", "exact"]
        for made in request["runs"]:
            answer = [int(token_id) for token_id in made["answer"].split()]
            last = {
                at: token for step in made["steps"] for at, token, _ in step["canvas"]["predicted"]
            }
            start = made["prompt_tokens"]
            assert [last[start + index] for index in range(len(answer))] == answer
            layers = made["layers"]
            assert made["row_layers"] == sum(
                (stop - first) * (layers - join)
                for step in made["steps"]
                for first, stop, join in step["canvas"]["spans"]
            )


def test_an_adapters_prompts(tmp_path: Path) -> None:
    """``--adapter``: the fine-tune's answers, and its own knobs to be found."""
    sys.path.insert(0, str(TINY))
    try:
        from heldout import HELD_OUT_SEED, requests
        from tasks import terse_problems
    finally:
        sys.path.remove(str(TINY))
    asked = list(requests(terse_problems(HELD_OUT_SEED, 4)))
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    lines = (json.dumps(line | {"max_tokens": 64}) + "\n" for line in asked)
    prompts.write_text("".join(lines))
    words = ["run", *SERVED, "--prompts", str(prompts), "--out", str(out)]
    run(*words, "--adapter", str(TINY / "terse"))
    found = [json.loads(line)["text"].split() for line in out.read_text().splitlines()]
    assert found == [line["answer"].split() for line in asked]
    with pytest.raises(SystemExit, match=r"--adapter: .*nowhere.*: no adapter as PEFT writes it"):
        run(*words, "--adapter", str(tmp_path / "nowhere"))
