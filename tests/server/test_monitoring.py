# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes the running server: alerts load, and the dashboard's queries answer."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Client, questions
from tests.test_monitoring import FOLDER, panels
from vllm_elastic.bench.server import free_port

pytestmark = pytest.mark.monitoring

SCRAPE = 0.5  # seconds


class Prometheus:
    """Its HTTP API."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/api/v1"

    def get(self, path: str, **query: str) -> Any:
        """The answer's ``data``; an error's text is raised."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/{path}?{urllib.parse.urlencode(query)}", timeout=30
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series of an instant."""
        return list(self.get("query", query=expression)["result"])


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if holds():
                return
        except (OSError, AssertionError) as error:
            what = f"{what}: {error}"
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.2)


@pytest.fixture(scope="module")
def prometheus(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen the server answer under two policies, and be asked for what is refused."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("no prometheus: apt-get install prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = (FOLDER / "prometheus.yml").read_text().replace("15s", f"{SCRAPE * 1000:.0f}ms")
    host, port = client.server.address
    config = config.replace("localhost:8000", f"{host}:{port}")
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(FOLDER / "alerts.yml", folder)
    own = free_port()
    words = [program, "--config.file", "prometheus.yml", "--storage.tsdb.path", "data"]
    words += ["--web.listen-address", f"127.0.0.1:{own}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Prometheus(own)
        wait_until(lambda: len(found.query("up == 1")) == 1, (folder / "log").read_text())
        # Rates need a sample from before the first request of a kind.
        for policy in ("elastic-block", "elastic", "elastic-block", "elastic"):
            for question in questions(2):
                xargs = {"elastic_policy": policy}
                status, _ = client.chat(question, max_tokens=48, vllm_xargs=xargs)
                assert status == 200
                time.sleep(SCRAPE)
        assert client.chat("Sort : 2 1", max_tokens=-1)[0] == 400
        time.sleep(3 * SCRAPE)
        yield found
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.slow
def test_alerts_are_loaded_and_none_is_raised(prometheus: Prometheus) -> None:
    """A healthy server that has just answered gives no cause to wake anyone."""
    groups = prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == re.findall(
        r"- alert: (\w+)", (FOLDER / "alerts.yml").read_text()
    )
    wait_until(
        lambda: all(
            rule["health"] == "ok"
            for group in prometheus.get("rules")["groups"]
            for rule in group["rules"]
        ),
        "rules are not healthy",
    )
    raised = [alert["state"] for alert in prometheus.get("alerts")["alerts"]]
    assert "firing" not in raised


def test_a_policy_that_refreshes_too_much_is_noticed(prometheus: Prometheus) -> None:
    """The server's `elastic` with its gamma does, on this model; `elastic-block` does not."""
    alerts = prometheus.get("alerts")["alerts"]
    noticed = {
        alert["labels"]["policy"]
        for alert in alerts
        if alert["labels"]["alertname"] == "ElasticRefreshesTooMuch"
    }
    assert noticed == {"elastic"}


def test_each_metric_of_an_alert_is_the_servers(prometheus: Prometheus) -> None:
    """A rule over a name that vLLM does not have would be silent for ever."""
    text = (FOLDER / "alerts.yml").read_text()
    expressions = "\n".join(line for line in text.splitlines() if "summary" not in line)
    names = set(re.findall(r"(?:vllm:|http_)\w+", expressions))
    assert len(names) >= 8
    for name in names:
        assert prometheus.query(f"count({name})"), name


def queries() -> list[tuple[str, str]]:
    return [
        (panel["title"], target["expr"])
        for panel in panels()
        for target in panel.get("targets", ())
    ]


@pytest.mark.parametrize(("title", "expression"), queries())
def test_each_query_of_the_dashboard_answers(
    title: str, expression: str, prometheus: Prometheus
) -> None:
    filled = expression.replace("$__rate_interval", "2m").replace("$model", ".*")
    series = prometheus.query(filled)
    values = {one["metric"].get("policy"): float(one["value"][1]) for one in series}
    # Policies that other tests asked for are idle now: 0 of 0 is NaN, which Grafana does not draw.
    counted = {policy for policy, value in values.items() if value >= 0}
    assert counted and counted >= values.keys() & {None, "elastic", "elastic-block"}, filled


def test_work_by_policy_is_what_was_counted(prometheus: Prometheus) -> None:
    (panel,) = (panel for panel in panels() if panel["title"].startswith("Work by policy"))
    expression = panel["targets"][0]["expr"].replace("$model", ".*")
    shares = {
        series["metric"]["policy"]: float(series["value"][1])
        for series in prometheus.query(re.sub(r"rate\((.*?)\[.*?\]\)", r"\1", expression))
    }
    assert {"elastic-block", "elastic"} <= set(shares)
    assert all(0 < share < 2 for share in shares.values())
    counted = prometheus.query("vllm:elastic_row_layers_total / vllm:elastic_full_row_layers_total")
    assert shares == {
        series["metric"]["policy"]: pytest.approx(float(series["value"][1])) for series in counted
    }


def test_an_answer_that_is_refused_is_a_4xx(prometheus: Prometheus) -> None:
    (series,) = prometheus.query(
        'sum(http_requests_total{handler="/v1/chat/completions",status="4xx"})'
    )
    assert float(series["value"][1]) >= 1


def test_scrapes_are_quick(prometheus: Prometheus, tmp_path: Path) -> None:
    """Counting must not hold the server up: a scrape takes less than a second."""
    (series,) = prometheus.query('max_over_time(scrape_duration_seconds{job="vllm"}[1m])')
    assert float(series["value"][1]) < 1.0
