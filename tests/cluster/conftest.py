# SPDX-License-Identifier: Apache-2.0
"""Clusters of Ray nodes, and a table of what was run at the end: ``make cluster-test``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .ray_node import Cluster, two_nodes
from .second_machine import why_not

HERE = Path(__file__).parent
COLUMNS = {
    "executor": "executor",
    "nodes": "nodes",
    "policies": "policies",
    "requests": "requests",
    "equal": "equal",
    "told": "told after",
    "ended": "ended after",
    "note": "note",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(900))


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``row(executor=..., requests=...)``: what the closing table says of this test."""

    def record(**columns: Any) -> None:
        assert columns.keys() <= COLUMNS.keys()
        for name, value in columns.items():
            record_property(name, f"{value:.1f} s" if isinstance(value, float) else value)

    return record


@pytest.fixture(scope="session")
def second_machine_permitted() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def cluster(second_machine_permitted: None) -> Iterator[Cluster]:
    """Ray over two machines; a test may break it."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("no Ray here: install the extra `ray`")
    with two_nodes() as cluster:
        yield cluster


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [
        (outcome, report)
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if "tests/cluster/" in report.nodeid
    ]
    if not reports:
        return
    table = [["test", "outcome", *COLUMNS.values()]]
    for outcome, report in reports:
        values = dict(report.user_properties)
        if outcome == "skipped":
            values["note"] = str(report.longrepr[2]).removeprefix("Skipped: ")
        name = report.nodeid.rpartition("::")[2].removeprefix("test_")
        table.append([name, outcome, *(str(values.get(key, "")) for key in COLUMNS)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    terminalreporter.section("cluster")
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        terminalreporter.line("  ".join(cells).rstrip())
