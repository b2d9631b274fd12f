# SPDX-License-Identifier: Apache-2.0
"""``bench report``: what it refuses, and the page in a browser, held against the records."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.browser import assert_no_errors, browser, texts, wait_until
from tests.decoding.fake_model import Scenario, drive
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.report import NEEDED
from vllm_elastic.bench.report import page as page_of
from vllm_elastic.config import ElasticConfig
from vllm_elastic.page import FOLDER

SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"policy": "elastic-block", "granularity": 4, "block_drift": 0.1, "window": 6},
    "replays": {"policy": "elastic-block", "refresh": "replay", "window": 6, "granularity": 4},
    "published": {"policy": "elastic", "window": 6},
    "grows": {"policy": "elastic-block", "window": 6, "grow_by": 8, "granularity": 4},
    "none": {"policy": "none", "window": 6},
}
END = 1
WORD = {0: " zero", 1: "<|end|>", 2: "</script>", 3: "\n", 4: "ä", 5: " five", 6: "<b>", 7: "x"}


def record_of(name: str, config: dict[str, Any], seed: int) -> dict[str, Any]:
    """A run record, of a request that a random model answered."""
    knobs = ElasticConfig.from_dict({**config, "record": True, "record_rows": True,
                                     "record_canvas": True})  # fmt: skip
    scenario = Scenario(knobs, 11, 24, 5, seed=seed, drift_rate=0.4, end_tokens=frozenset([END]))
    trace = drive(scenario)
    record, answer = trace.request.record, scenario.shown
    ended = answer[-1] == END
    return {
        "id": name,
        "policy": knobs.policy,
        "layers": scenario.num_layers,
        "canvas": scenario.length,
        "prompt_tokens": scenario.prompt_length,
        "token_ids": answer[:-1] if ended else answer,
        "denoising_steps": record.denoising_steps,
        "passes": record.passes,
        "row_layers": record.row_layers,
        "full_row_layers": record.full_row_layers,
        "seconds": 1.25,
        "steps": record.steps,
        "knobs": asdict(knobs),
        "prompt_token_ids": [5] * scenario.prompt_length,
        "words": {str(token_id): word for token_id, word in WORD.items()},
    }


REQUESTS = {"one": 53, "two": 6}  # seeds of answers with an end token and without
RECORDS = {
    setting: [record_of(name, config, seed) for name, seed in REQUESTS.items()]
    for setting, config in SETTINGS.items()
}


def write(folder: Path, records: dict[str, list[dict[str, Any]]]) -> list[str]:
    files = []
    for setting, lines in records.items():
        path = folder / f"{setting}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files.append(str(path))
    return files


def report(folder: Path, records: dict[str, list[dict[str, Any]]] = RECORDS) -> Path:
    out = folder / "report.html"
    args = make_parser().parse_args(["report", *write(folder, records), "--out", str(out)])
    args.function(args)
    return out


# What it refuses.


@pytest.mark.parametrize("name", NEEDED)
def test_says_what_a_record_lacks(name: str, tmp_path: Path) -> None:
    lacking = {key: value for key, value in RECORDS["none"][0].items() if key != name}
    with pytest.raises(SystemExit, match=rf"none\.jsonl:1: lacks {name}; `bench run --canvas`"):
        report(tmp_path, {"none": [lacking]})


def test_the_same_request_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="request 'one' is there twice as 'none'"):
        report(tmp_path, {"none": [RECORDS["none"][0]] * 2})


def test_different_prompts_under_one_id_are_refused(tmp_path: Path) -> None:
    other = {**RECORDS["block"][0], "prompt_token_ids": [6] * 11}
    with pytest.raises(SystemExit, match="request 'one' have different prompts"):
        report(tmp_path, {"none": [RECORDS["none"][0]], "block": [other]})


def test_no_records_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no records"):
        report(tmp_path, {"none": []})
    (tmp_path / "bad.jsonl").write_text("{")
    args = make_parser().parse_args(["report", str(tmp_path / "bad.jsonl"), "--out", "x"])
    with pytest.raises(SystemExit, match=r"bad\.jsonl:1: not JSON"):
        args.function(args)


# What it shows.


def test_no_other_file_and_no_network(tmp_path: Path) -> None:
    html = report(tmp_path).read_text()
    assert not re.search(r'(src|href)="(?!data:)', html)
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', html, re.S)
    words = json.loads(data)["requests"][0]["words"]
    assert words == {str(token_id): word for token_id, word in WORD.items()}


def test_vendored_libraries_are_what_the_list_says() -> None:
    """A library would be renewed, and the list of versions and licences forgotten."""
    listed = (FOLDER / "vendor" / "README.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| `([@\w/]+)` .*? \| ([\d.]+) \|.*\((.*)\)", listed, re.M)
    scripts = {path.name for path in (FOLDER / "vendor").glob("*.js")}
    assert {row[0] for row in rows} == scripts
    for file, package, version, licence in rows:
        first = (FOLDER / "vendor" / file).read_text().splitlines()[0]
        assert f"v{version} " in first and package.split("/")[-1] in first
        assert "Permission to use, copy" in (FOLDER / "vendor" / licence).read_text()


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = report(tmp_path_factory.mktemp("report"))
    with browser() as driver:
        driver.get(path.as_uri())
        yield driver


@pytest.fixture
def page(opened: Any) -> Iterator[Any]:
    """The page of the first request, at its masks; it has nothing to complain of afterwards."""
    opened.execute_script("choose(data.requests[0]); replay.setClock('passes'); replay.go(0)")
    opened.execute_script("byId('together').value = 'passes'")
    yield opened
    assert_no_errors(opened)


def press(driver: Any, keys: str) -> None:
    driver.find_element("css selector", "body").send_keys(keys)


def wait_for(driver: Any, expression: str, value: Any) -> None:
    """A key pressed is not yet a key that the page has seen."""
    wait_until(
        lambda: driver.execute_script(f"return {expression}") == value,
        f"{expression} is not {value}",
    )


@pytest.mark.slow
def test_shows_each_pass_of_each_setting(page: Any) -> None:
    """Tokens, work and words after every pass are those of the records."""
    most = max(records[0]["passes"] for records in RECORDS.values())
    for position in range(most + 1):
        page.execute_script("replay.go(arguments[0])", position)
        shown = {name: texts(page, f'[data-setting="{name}"] .figures b')[:3] for name in SETTINGS}
        for name, records in RECORDS.items():
            record = records[0]
            passes = min(position, record["passes"])
            steps = record["steps"][:passes]
            work = sum(
                rows * (record["layers"] - layer)
                for step in steps
                for layer, rows in step["segments"]
            )
            end = record["prompt_tokens"] + len(record["token_ids"])
            done = sum(p < end for step in steps for p in step["committed"])
            assert shown[name] == [str(passes), str(done), f"{work:,}"]


def test_ends_with_the_answer(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, Keys.END)
    wait_for(page, "replay.position", max(records[0]["passes"] for records in RECORDS.values()))
    for name, records in RECORDS.items():
        record = records[0]
        cells = page.execute_script(
            "return replay.panels.find(p => p.run.setting === arguments[0]).answer.spans"
            ".map(s => [s.className, s.textContent])",
            name,
        )
        expected = [WORD[token_id].strip() or "⏎" for token_id in record["token_ids"]]
        done = [text for kind, text in cells[: len(expected)] if "done" in kind]
        assert done == expected
        fresh = [index for index, (kind, _) in enumerate(cells) if "fresh" in kind]
        last = record["steps"][-1]["committed"]
        assert [index + record["prompt_tokens"] for index in fresh] == last
        joined = {p for start, stop, _ in record["steps"][-1]["canvas"]["spans"]
                  for p in range(start, stop)}  # fmt: skip
        marked = {
            index + record["prompt_tokens"]
            for index, (kind, _) in enumerate(cells)
            if "computed" in kind or "joined" in kind
        }
        assert marked == {p for p in joined if p >= record["prompt_tokens"]}


def test_an_answer_that_grows(page: Any) -> None:
    """What is not there yet is no mask, and is not taken for the end of the answer."""
    record = RECORDS["grows"][0]
    lengths = [step["canvas"]["length"] for step in record["steps"]]
    assert len(set(lengths)) > 1
    for passes, step in enumerate(record["steps"], start=1):
        length, end = (step["canvas"][name] for name in ("length", "end"))
        page.execute_script("replay.go(arguments[0])", passes)
        dropped = page.execute_script(
            "return replay.panels.find(p => p.run.setting === 'grows').answer.spans"
            ".map(s => s.className.includes('dropped'))"
        )
        assert all(dropped[length - record["prompt_tokens"] :])
        assert not any(dropped[: end - record["prompt_tokens"]])


def test_plays_and_pauses(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    press(page, "--")
    wait_for(page, "byId('speed').value", "1")
    page.find_element("id", "play").click()
    wait_until(lambda: page.execute_script("return replay.position") >= 1, "it does not play")
    press(page, " ")
    wait_for(page, "playing", None)
    at = page.execute_script("return replay.position")
    press(page, Keys.ARROW_RIGHT)
    wait_for(page, "replay.position", at + 1)
    press(page, Keys.ARROW_LEFT + Keys.ARROW_LEFT)
    wait_for(page, "replay.position", at - 1)
    assert texts(page, "#clock")[0].startswith(f"pass {at - 1} of")
    press(page, Keys.HOME)
    wait_for(page, "replay.position", 0)
    assert set(texts(page, ".figures .done")) == {"0"}


def test_together_by_row_layers(page: Any) -> None:
    """At each moment no setting has computed more than the clock says, nor could compute more."""
    press(page, "w")
    wait_for(page, "replay.clock", "work")
    most = max(records[0]["row_layers"] for records in RECORDS.values())
    for position in (0, 60, 150, 300):
        page.execute_script("replay.go(arguments[0])", position)
        for name, (record, _) in RECORDS.items():
            passes = int(texts(page, f'[data-setting="{name}"] .pass')[0])
            work = page.execute_script(
                "return replay.panels.find(p => p.run.setting === arguments[0]).run.work", name
            )
            assert work[-1] == record["row_layers"]
            none = page.execute_script(
                "return replay.panels.find(p => p.run.setting === arguments[0]).run.none", name
            )
            assert none[-1] == record["full_row_layers"]
            allowed = most * position / 300 + 0.5
            assert work[passes] <= allowed
            assert passes == record["passes"] or work[passes + 1] > allowed


def test_totals(page: Any) -> None:
    rows = page.find_elements("css selector", "tr[data-setting]")
    for requests, found in ((1, rows[: len(SETTINGS)]), (2, rows[len(SETTINGS) :])):
        assert len(found) == len(SETTINGS)
        for row, (name, records) in zip(found, RECORDS.items(), strict=True):
            some, none = records[:requests], RECORDS["none"]
            tokens = sum(len(r["token_ids"]) for r in some)
            passes = sum(r["passes"] for r in some)
            work = sum(r["row_layers"] for r in some)
            share = 100 * work / sum(r["full_row_layers"] for r in some)
            cells = [cell.text for cell in row.find_elements("css selector", "td")]
            assert cells[:3] == [name, str(tokens), str(passes)]
            assert float(cells[3]) == pytest.approx(tokens / passes, abs=0.006)
            assert float(cells[4].replace(",", "")) == pytest.approx(work / tokens, abs=0.51)
            assert float(cells[5].rstrip("%")) == pytest.approx(share, abs=0.51)
            assert float(cells[6]) == 1.25 * requests
            same = sum(
                r["token_ids"] == n["token_ids"] for r, n in zip(some, none[:requests], strict=True)
            )
            assert cells[7] == f"{same} of {requests}"


def test_says_what_was_stale_and_why(page: Any) -> None:
    """The sentence of a pass and the hatched blocks are what the record's verdict says."""
    seen = set()
    for name in ("block", "published"):
        record = RECORDS[name][0]
        for index, step in enumerate(record["steps"]):
            page.execute_script("replay.go(arguments[0])", index + 1)
            panel = page.find_element("css selector", f'[data-setting="{name}"]')
            why = panel.find_element("css selector", ".why").text
            canvas = step["canvas"]
            stale = [layer for layer in canvas["stale_from"] if layer < record["layers"]]
            hatched = panel.find_elements("css selector", 'svg.map rect[fill^="url(#stale"]')
            assert len(hatched) == len(stale)
            judged = canvas["judged_by"]
            if judged:
                pairs = zip(judged["attention"], judged["drift"], strict=True)
                cost = sum(share * drift for share, drift in pairs)
                assert f"{cost:.4f}" in why
                assert ("exceed 0.1" in why) == bool(stale)
                seen.add(("cost", bool(stale)))
            if "similarities" in step and stale:
                assert f"stale from layer {min(stale)}" in why
                seen.add(("similarity", True))
    assert seen == {("cost", True), ("cost", False), ("similarity", True)}


def test_another_request(page: Any) -> None:
    page.find_elements("css selector", "#requests button")[1].click()
    page.execute_script("replay.go(replay.last)")
    tokens = {str(len(records[1]["token_ids"])) for records in RECORDS.values()}
    assert set(texts(page, ".figures .done")) == tokens


@pytest.mark.parametrize("dark", [False, True])
def test_fits_a_phone(dark: bool, tmp_path: Path) -> None:
    with browser(390, 844, dark) as driver:
        driver.get(report(tmp_path).as_uri())
        driver.execute_script("replay.go(3)")
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        panels = driver.find_elements("css selector", ".panel")
        assert all(panel.rect["width"] <= 390 for panel in panels)
        ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", ground)[0])
        assert red < 60 if dark else red > 200
        assert driver.execute_script("return performance.getEntriesByType('resource')") == []
        assert_no_errors(driver)


@pytest.mark.engine
@pytest.mark.slow
def test_report_of_the_demo(tmp_path: Path) -> None:
    """`make report`: three problems under four settings, the records beside the page."""
    out = tmp_path / "new" / "report.html"
    script = Path(__file__).parents[2] / "examples" / "report.py"
    subprocess.run([sys.executable, script, "--out", out], check=True, timeout=250)
    lines = out.with_suffix(".jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    settings = ["block (default)", "dual-cache", "published", "exact"]
    names = [(record["setting"], record["id"]) for record in records]
    assert names == [(setting, task) for setting in settings for task in ("word", "table", "chain")]
    assert out.read_text() == page_of(records)
    with browser() as driver:
        driver.get(out.as_uri())
        driver.execute_script("replay.go(replay.last)")
        assert [text.split("\n")[0] for text in texts(driver, ".panel h2")] == settings
        assert_no_errors(driver)
