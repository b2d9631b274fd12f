# SPDX-License-Identifier: Apache-2.0
"""Every code block of README.md, docs/ and the examples: run, read by its own parser, or excused.

A block that is none of the three fails. What takes minutes runs with ``pytest -m long``, on few
problems; what asks a server runs in ``tests/server/test_documented_requests.py``.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.documented_commands import PAGES, ROOT, Block, blocks, commands
from vllm_elastic.config import ElasticConfig

TINY = "examples/tiny_llada/checkpoint"
BLOCKS = blocks()
LANGUAGES = {"bash", "sh", "python", ""}  # the last are formulas, messages and drawings

# What a reader puts his own in place of -> what stands there when a command is run here.
PLACEHOLDERS = {
    "DIR": TINY,
    "FILE": "out/heldout_short.jsonl",
    "prompts.jsonl": "out/heldout_short.jsonl",
    "PROMPTS.jsonl": "out/heldout_short.jsonl",
}

# Commands that are not run from here, by how they begin, and why. A test named in a reason runs it.
EXCUSED = {
    "git clone": "of what is here already",
    ".": "the shell's",
    "cd": "the shell's",
    "export": "the shell's",
    "for": "the shell's",
    "done": "the shell's",
    "make": "its targets are those of the Makefile: test_make_targets_are_there",
    "pip install": "installs packages: tests/test_wheel.py",
    "pip uninstall": "of what `pip install` brings: tests/patches/test_torchvision.py",
    "uv pip": "installs packages, by a tool that is not here",
    "ray": "Ray's: tests/cluster/test_two_nodes.py",
    "serve run": "Ray Serve's: tests/cluster/test_ray_serve.py",
    "bash scripts/gpu/setup.sh": "installs gigabytes of packages",
    "bash scripts/gpu/bundle.sh": "downloads them",
    "docker": "no container runtime was at hand: tests/test_container.py reads the files",
    "kubectl": "no cluster was at hand: tests/test_kubernetes.py reads the manifests",
    "prometheus": "tests/server/test_monitoring.py",
    "promtool": "tests/test_monitoring.py",
    "guidellm": "a package of its own",
    "python -m pytest -p tests.simulated_card": "tests/test_simulated_card.py",
    "python -m venv": "an environment of its own: tests/test_evaluate.py",
    ".venv-evaluate/bin/pip": "an environment of its own: tests/test_evaluate.py",
    "$run": "hours of training: examples/tiny_llada/test_tiny_llada.py trains for a moment",
    "run=./launch.sh --wait RUN_FOLDER": "hours too: examples/tiny_llada/test_tiny_llada.py",
    "run=python examples/tiny_llada_v/learn.py": "too: examples/tiny_llada_v/test_tiny_llada_v.py",
}
ASKS_A_SERVER = ("curl", "python ../stream.py")  # tests/server/test_documented_requests.py

# Python blocks, by how they begin, and the test that runs each.
PYTHON = {
    "LLM(model=...": "tests/test_code_blocks.py::test_keywords_of_llm",
    "class EveryOther": "tests/decoding/test_policies.py::test_the_policy_of_the_docs",
    "from vllm import LLM\nfrom vllm.lora": "tests/engine/test_adapters.py::test_documented_calls",
    "llm.generate(": "tests/engine/test_images.py::test_documented_calls",
}


def begins(words: list[str], start: str) -> bool:
    return " ".join([*words, ""]).startswith(f"{start} ")


def shell_commands() -> list[tuple[Block, list[str]]]:
    return [
        (block, command)
        for block in BLOCKS
        if block.language in ("bash", "sh")
        for command in commands(block.text)
    ]


COMMANDS = shell_commands()


def of(start: str) -> list[Any]:
    """The distinct commands that begin so, as parameters of a test."""
    found = {shlex.join(words): words for _, words in COMMANDS if begins(words, start)}
    return [pytest.param(words, id=line[:60]) for line, words in found.items()]


# Read by their own parsers. Of one that a script makes inside its main there is only the help.


def parse_bench(words: list[str]) -> None:
    from vllm_elastic.bench.__main__ import make_parser

    make_parser().parse_args(words)


def parse_watch(words: list[str]) -> None:
    from vllm_elastic.watch.__main__ import make_parser

    make_parser().parse_args(words)


def parse_quantised(words: list[str]) -> None:
    from tests.quantised import make_parser

    make_parser().parse_args(words)


def parse_serve(words: list[str]) -> None:
    from tests.serve_arguments import parse_as_vllm_serve

    parse_as_vllm_serve(["{}" if word.startswith("$(cat ") else word for word in words])


def parse_vllm_bench_serve(words: list[str]) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(allow_abbrev=False)
    add_cli_args(parser)
    parser.parse_args(words)


PARSED: dict[str, Callable[[list[str]], None]] = {
    "python -m vllm_elastic.bench": parse_bench,
    "python -m tests.simulated_card vllm_elastic.bench": parse_bench,
    "python -m vllm_elastic.watch": parse_watch,
    "python -m tests.quantised": parse_quantised,
    "vllm serve": parse_serve,
    "vllm bench serve": parse_vllm_bench_serve,
}


def script_of(words: list[str]) -> str | None:
    """A script of this repository's that a command runs."""
    if len(words) < 2 or not words[0].endswith("python"):
        return None
    return words[1] if words[1].startswith("examples/") else None


SCRIPTS = sorted({script for _, words in COMMANDS if (script := script_of(words))})

# Of scripts, the files named on its command line, one after the other as if each were run alone.
HELP_OF_EACH = """
import contextlib, io, json, runpy, sys
from pathlib import Path

helps = {}
for script in sys.argv[1:]:
    folder = str(Path(script).parent)
    sys.path.insert(0, folder)
    sys.argv = [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    helps[script] = said.getvalue()
    sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == Path(folder):
            del sys.modules[name]
print(json.dumps(helps))
"""


@functools.cache
def helps() -> dict[str, str]:
    """What each script says to ``--help``; in one process, since torch takes seconds each time."""
    ran = subprocess.run(
        [sys.executable, "-c", HELP_OF_EACH, *(str(ROOT / script) for script in SCRIPTS)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=500,
    )
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    return {script: said[str(ROOT / script)] for script in SCRIPTS}


@pytest.mark.parametrize("start", PARSED)
def test_commands_are_understood(start: str) -> None:
    found = [words for _, words in COMMANDS if begins(words, start)]
    assert found, f"nothing documents {start!r}: take it out of PARSED"
    for words in found:
        PARSED[start](words[len(start.split()) :])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_the_flags(script: str) -> None:
    for _, words in COMMANDS:
        if script_of(words) == script:
            flags = {word for word in words if word.startswith("--")}
            missing = [flag for flag in flags if not re.search(rf"{flag}\b", helps()[script])]
            assert not missing, words


def test_every_block_is_covered() -> None:
    """A new command would be run by nobody before its first reader."""
    for block in BLOCKS:
        where = f"{block.page.relative_to(ROOT)}: {block.text.splitlines()[0]}"
        assert block.language in LANGUAGES, f"{where}\na language that no test knows"
        if block.language == "python":
            assert any(block.text.startswith(start) for start in PYTHON), f"{where}\nsee PYTHON"
            ast.parse(block.text)
    known = (*PARSED, *EXCUSED, *ASKS_A_SERVER)
    for block, words in COMMANDS:
        covered = script_of(words) or any(begins(words, start) for start in known)
        assert covered, (
            f"{block.page.relative_to(ROOT)}: {shlex.join(words)}\nneither read by a parser "
            "(PARSED), nor run by a server's test (ASKS_A_SERVER), nor excused (EXCUSED)"
        )


def test_no_excuse_is_stale() -> None:
    for start, reason in EXCUSED.items():
        assert any(begins(words, start) for _, words in COMMANDS), f"no page has {start!r}"
        for path in re.findall(r"\S+\.py", reason):
            assert (ROOT / path).exists(), reason
    for start, test in PYTHON.items():
        assert any(block.text.startswith(start) for block in BLOCKS), start
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test


def test_make_targets_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {words[1] for _, words in COMMANDS if words[0] == "make"}
    assert named and named <= targets


def test_keywords_of_llm() -> None:
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in fields(EngineArgs)}
    found = [block for block in BLOCKS if block.text.startswith("LLM(")]
    for block in found:
        (call,) = (node for node in ast.walk(ast.parse(block.text)) if isinstance(node, ast.Call))
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        assert set(given) <= known
        ElasticConfig.from_dict(ast.literal_eval(given["additional_config"])["elastic"])
    assert found


# Run.


@pytest.mark.parametrize("words", of("python -m vllm_elastic.bench plan"))
def test_plans_are_made(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vllm_elastic.bench.__main__ import make_parser

    monkeypatch.chdir(ROOT)
    args = make_parser().parse_args([PLACEHOLDERS.get(word, word) for word in words[3:]])
    args.function(args)
    assert "| ranks |" in capsys.readouterr().out


def few(script: str) -> str:
    """The same commands on a handful of problems, with a reader's files in place."""
    for name, path in PLACEHOLDERS.items():
        script = re.sub(rf"(?<=[ =]){re.escape(name)}(?=\s|$)", path, script, flags=re.M)
    script = re.sub(r"heldout\.py (\S+)", r"heldout.py \1 --count 5", script)
    script = re.sub(r"--(problems|count|repeats) \d+", r"--\1 2", script)
    return re.sub(r"--oracle-problems \d+", "--oracle-problems 0", script)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The repository's files, where commands may write."""
    for path in ROOT.iterdir():
        if path.name not in ("out", "docs", ".git"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "docs" / "images").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    return tmp_path


def lines_to_run(block: Block) -> list[str]:
    """Of a block whose commands are Python of this repository's, but for servers; else none."""
    asked = [words for words in commands(block.text) if not begins(words, "vllm serve")]
    ours = all(
        begins(words, "python -m vllm_elastic.bench")
        or (words[0] == "python" and script_of(words))
        or words[0] in LOOP
        for words in asked
    )
    if not ours or block.language != "bash":
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in lines if "vllm serve " not in line]


LOOP = ("for", "done")
RUN_PAGES = [page for page in PAGES if any(b.page == page and lines_to_run(b) for b in BLOCKS)]


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_runs(page: Path, clone: Path) -> None:
    """From its first block to its last, as a reader would, in a clone of this repository."""
    lines = ["set -eo pipefail", "python examples/tiny_llada/heldout.py out"]
    for block in BLOCKS:
        if block.page == page:
            lines += lines_to_run(block)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    ran = subprocess.run(
        ["bash", "-c", few("\n".join(lines))],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
