# SPDX-License-Identifier: Apache-2.0
"""``make gpu-test`` on a machine whose card, and whose tests, are made up here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "gpu" / "test.sh"
SETUP = ROOT / "scripts" / "gpu" / "setup.sh"

STAGES = ["kernels", "oracle", "trained", "batches", "graphs", "whole", "ranks"]

CARD = "NVIDIA H100 80GB HBM3, 580.65.06, 81559 MiB, 9.0"

# pytest of one stage fails, that of another hangs; anything else is asked of the real Python.
PYTHON = """#!/usr/bin/env bash
case "$*" in
    *pytest*tests/runner*) echo "1 failed, 40 passed in 3.21s"; exit 1 ;;
    *pytest*test_overlap*) sleep 60 ;;
    *pytest*) echo "7 passed, 2 skipped in 1.00s" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, str]:
    """The environment of one with a card."""
    for name, text in {"nvidia-smi": f"#!/bin/sh\necho '{CARD}'\n", "python": PYTHON}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": str(tmp_path / "python"),
        "REAL_PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "SECONDS_A_STAGE": "2",
    }


def run(machine: dict[str, str], *stages: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *stages],
        env=machine,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(machine: dict[str, str]) -> None:
    """Half an hour of a card would be over with the first fault."""
    done = run(machine)
    assert done.returncode == 1
    out = Path(machine["OUT"])
    lines = (out / "summary.txt").read_text().splitlines()
    assert done.stdout.splitlines()[-len(lines) :] == lines
    assert [line.split()[0] for line in lines] == STAGES
    outcomes = {line.split()[0]: line[9:29].strip() for line in lines}
    assert outcomes == dict.fromkeys(STAGES, "passed") | {
        "kernels": "FAILED",
        "batches": "stopped after 2 s",
    }
    assert lines[0].endswith("1 failed, 40 passed in 3.21s")
    assert lines[1].endswith("7 passed, 2 skipped in 1.00s")
    assert {path.name for path in out.glob("*.log")} == {f"{s}.log" for s in [*STAGES, "machine"]}


def test_card_driver_and_versions_are_named(machine: dict[str, str]) -> None:
    done = run(machine, "trained")
    assert done.returncode == 0, done.stderr
    assert f"== {CARD}" in done.stdout
    log = (Path(machine["OUT"]) / "machine.log").read_text()
    assert log.startswith(CARD)
    for name in ("Python", "torch", r"vllm\S*", "triton", "transformers", "numpy"):
        assert re.search(rf"\b{name} \d+\.\d+", log), name
    assert len((Path(machine["OUT"]) / "summary.txt").read_text().splitlines()) == 1


@pytest.mark.parametrize("own", [False, True], ids=["in OUT", "named"])
def test_what_was_compiled_is_kept(own: bool, machine: dict[str, str]) -> None:
    """A stage that was stopped for compiling alone would be stopped each time."""
    folder = Path(machine["OUT"]).parent / "kept" if own else Path(machine["OUT"]) / "compiled"
    folders = {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
    }
    shown = " ".join(f"${name}" for name in folders)
    Path(machine["PYTHON"]).write_text(f'#!/bin/sh\necho "{shown}"\n')
    others = {name: value for name, value in machine.items() if name not in folders}
    relative = os.path.relpath(machine["OUT"], ROOT)
    done = run(others | {"OUT": relative} | (folders if own else {}), "graphs")
    assert done.returncode == 0, done.stderr
    assert " ".join(folders.values()) in (Path(machine["OUT"]) / "graphs.log").read_text()


def test_no_card_is_said(machine: dict[str, str]) -> None:
    (Path(machine["PYTHON"]).parent / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    done = run(machine, "oracle")
    assert "== no card: nvidia-smi does not answer" in done.stdout
    assert "torch works on: CPU" in done.stdout


@pytest.mark.parametrize(
    ("stages", "python", "message"),
    [
        (["orakel"], None, "no such stage: orakel"),
        ([], "nowhere/python", "nowhere/python not found: bash scripts/gpu/setup.sh"),
    ],
)
def test_what_is_not_there_is_said(
    stages: list[str], python: str | None, message: str, machine: dict[str, str]
) -> None:
    done = run(machine | ({"PYTHON": python} if python else {}), *stages)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr


def test_all_paths_are_there() -> None:
    """pytest would fail with a path that was moved, on a machine where time is short."""
    paths = re.findall(r"tests/[\w/.]+", SCRIPT.read_text())
    assert len(paths) > 12
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("able", [True, False], ids=["with pip", "without"])
def test_a_bundle_is_made_by_the_python_that_is_there(able: bool, tmp_path: Path) -> None:
    """A fresh clone has no .venv."""
    clone, programs = tmp_path / "clone", tmp_path / "bin"
    (clone / "scripts" / "gpu").mkdir(parents=True)
    script = clone / "scripts" / "gpu" / "bundle.sh"
    script.write_text((SETUP.parent / "bundle.sh").read_text())
    (clone / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    programs.mkdir()
    python = programs / "python3.11"
    python.write_text(
        "#!/bin/sh\n"
        f'case "$*" in "-m pip "*) echo "$*" >>{tmp_path}/asked; exit 0;; esac\n'
        + (f'exec {sys.executable} "$@"\n' if able else "exit 1\n")
    )
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "EXTRAS")}
    done = subprocess.run(
        ["bash", str(script), str(tmp_path / "bundle")],
        env=environment | {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHON_VERSION": "3.12"},
        capture_output=True,
        text=True,
        check=False,
    )
    if not able:
        assert done.returncode == 2
        assert "python3.11 is no Python >= 3.11 with pip; name one by PYTHON=" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    wheel, download = (tmp_path / "asked").read_text().splitlines()
    assert wheel.startswith("-m pip wheel")
    assert download.startswith("-m pip download --only-binary=:all: --python-version 3.12 ")
    requirements = (tmp_path / "bundle" / "requirements.txt").read_text().splitlines()
    assert requirements[0] == "vllm-elastic[cuda]" and len(requirements) > 3


@pytest.mark.parametrize(
    ("arguments", "installs"),
    [
        ([], "install --quiet --group card-tests -e .[cuda]"),
        (["BUNDLE"], "install --quiet --no-index --find-links BUNDLE --requirement BUNDLE/"),
    ],
    ids=["network", "bundle"],
)
def test_an_environment_without_a_card_is_told(
    arguments: list[str], installs: str, tmp_path: Path
) -> None:
    """What is asked of pip; and a torch that finds no card would run all tests on the CPU."""
    environment = tmp_path / "venv" / "bin"
    environment.mkdir(parents=True)
    (environment / "pip").write_text("")
    (environment / "python").write_text(
        f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\ncase "$1" in -c) echo no card; exit 1;; esac\n'
    )
    for path in environment.iterdir():
        path.chmod(0o755)
    done = subprocess.run(
        ["bash", str(SETUP), *arguments],
        env=os.environ | {"VENV": str(environment.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "no card" in done.stdout
    assert "make gpu-test" not in done.stdout
    assert installs in (tmp_path / "asked").read_text()
