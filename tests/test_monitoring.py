# SPDX-License-Identifier: Apache-2.0
"""examples/monitoring without a server: promtool's opinion, and the dashboard's form."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.documented_commands import ROOT

FOLDER = ROOT / "examples" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())

pytestmark = pytest.mark.monitoring


def promtool(*words: str) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool: apt-get install prometheus")
    done = subprocess.run([program, *words], cwd=FOLDER, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", (FOLDER / "alerts.yml").read_text())


def test_promtool_takes_rules_and_configuration() -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "alerts.yml")
    assert "valid" in promtool("check", "config", "prometheus.yml")


def test_each_alert_rises_when_it_should() -> None:
    promtool("test", "rules", "alerts_test.yml")


@pytest.mark.parametrize("alert", alerts())
def test_each_alert_is_tested_both_ways_and_explained(alert: str) -> None:
    """One that never rises, or always, or that nobody knows what to do about."""
    quiet, *loud = (FOLDER / "alerts_test.yml").read_text().split("  - name: ")[1:]
    assert f"alertname: {alert}}}" in quiet
    assert sum(f"alertname: {alert}\n        exp_alerts:" in test for test in loud) == 1
    assert f"| `{alert}` |" in (ROOT / "docs" / "deploy.md").read_text()


def panels() -> list[dict[str, Any]]:
    return list(DASHBOARD["panels"])


def test_panels_do_not_cover_each_other() -> None:
    """Grafana would move them about."""
    assert len({panel["id"] for panel in panels()}) == len(panels())
    places = [panel["gridPos"] for panel in panels()]
    assert all(p["x"] >= 0 and p["x"] + p["w"] <= 24 for p in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_panels_use_the_variables_that_are_there() -> None:
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD))) - {"__rate_interval", "__all"}
    assert used == names


def test_a_picture_for_each_of_our_metrics() -> None:
    """A counter that nobody looks at, or one that was renamed."""
    documented = set(
        re.findall(r"`(vllm:elastic_\w+)`", Path(ROOT / "docs/serving.md").read_text())
    )
    drawn = set(re.findall(r"vllm:elastic_\w+?(?=_bucket|\{)", json.dumps(DASHBOARD)))
    assert {name.removesuffix("_bucket") for name in drawn} >= documented - {
        "vllm:elastic_denoising_steps_total"  # its histogram is
    }
