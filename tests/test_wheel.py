# SPDX-License-Identifier: Apache-2.0
"""The built wheel: what is in it, and that it serves where nothing of the repository is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import urllib.request
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.documented_commands import ROOT, arguments, documented
from vllm_elastic.bench.server import ServerProcess

MODEL = ROOT / "examples" / "tiny_llada" / "checkpoint"
OPTIONS = ["--kv-cache-memory-bytes", "300000000", "--served-model-name", "tiny"]

QUESTION = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
ANSWER = "fig 91 jet 40 pin 62"

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]

# An empty PYTHONPATH is none: an environment's Python sees what is installed there, nothing else.
ALONE = {"PYTHONPATH": ""}

VLLM_COMMAND = """\
#!{python}
import sys
from vllm.entrypoints.cli.main import main

if __name__ == "__main__":  # the engine's process imports this file again
    sys.exit(main())
"""


def run(command: Sequence[str | Path], directory: Path | None = None) -> str:
    env = os.environ | ALONE
    done = subprocess.run(
        command, env=env, cwd=directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run([*PIP, "wheel", *options, ROOT])
    (built,) = folder.iterdir()
    return built


def test_holds_the_package_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "vllm_elastic"
    files = {path.relative_to(ROOT) for path in package.rglob("*") if path.is_file()}
    expected = {str(path) for path in files if "__pycache__" not in path.parts}
    metadata = f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info"
    expected |= {f"{metadata}/{name}" for name in ("METADATA", "WHEEL", "RECORD")}
    licences = [ROOT / "LICENSE", *package.glob("page/vendor/*.LICENSE")]
    expected |= {f"{metadata}/licenses/{path.relative_to(ROOT)}" for path in licences}
    expected |= {f"{metadata}/entry_points.txt"}
    assert set(zipfile.ZipFile(wheel).namelist()) == expected


@pytest.mark.long
@pytest.mark.server
def test_serves(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, which borrows vLLM, but not this checkout, from ours."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run([*PIP, "--python", python, "install", "--no-index", "--no-deps", wheel])
    packages = site_packages(folder)
    # Python reads no .pth of a folder that a .pth names: what we have installed as editable
    # is not to be found from there.
    (packages / "vllm.pth").write_text(sysconfig.get_path("purelib"))
    command = python.with_name("vllm")
    command.write_text(VLLM_COMMAND.format(python=python))
    command.chmod(0o755)
    assert_serves(python, packages, tmp_path)


def install_command() -> list[str]:
    """The documented way into an environment of one's own: what `pip` gets.

    The address of an index is left to pip's own settings, as with `make setup`.
    """
    lines = documented("pip install", [ROOT / "docs/installing.md"])
    lines = [line for line in lines if ".[cpu]" in line]
    (line,) = (line for line in lines if "--torch-backend" not in line)  # that one is for uv
    return ["install", *arguments(line.replace("--extra-index-url <address> ", ""))]


def test_readme_has_one_command_for_an_environment_of_ones_own() -> None:
    assert ".[cpu]" in install_command()


@pytest.mark.long
@pytest.mark.server
@pytest.mark.timeout(1800)
def test_readme_installs_into_an_empty_environment(tmp_path: Path) -> None:
    """Needs a package index, and 4 GB of disk."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True, with_pip=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", *install_command()], ROOT)
    run([python, "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"])
    assert_serves(python, site_packages(folder), tmp_path)


def assert_serves(python: Path, packages: Path, folder: Path) -> None:
    """``vllm serve`` of this environment, in an empty directory, gives a right answer."""
    directory = folder / "empty"
    directory.mkdir()
    where = run([python, "-c", "import vllm_elastic as it; print(it.__file__)"], directory)
    assert Path(where.strip()).is_relative_to(packages)
    log, command = folder / "server.log", python.with_name("vllm")
    with ServerProcess(
        MODEL, OPTIONS, log=log, env=ALONE, command=command, directory=directory
    ) as server:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 64}
        request = urllib.request.Request(
            f"{server.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            (choice,) = json.load(answer)["choices"]
    assert choice["message"]["content"].strip() == ANSWER
