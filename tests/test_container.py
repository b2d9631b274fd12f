# SPDX-License-Identifier: Apache-2.0
"""The recipes of examples/container: no container runtime here, so what can be read from them."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from tests.serve_arguments import parse_as_vllm_serve

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples" / "container").glob("Dockerfile*"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def instructions(recipe: Path) -> list[tuple[str, str]]:
    """(instruction, what follows), continued lines joined, comments left out."""
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest) for word, _, rest in (line.partition(" ") for line in text.split("\n") if line)
    ]


def copied(recipe: Path) -> list[str]:
    sources = []
    for word, rest in instructions(recipe):
        if word == "COPY":
            sources += rest.split()[:-1]
    return sources


def test_there_are_two() -> None:
    assert [path.name for path in RECIPES] == ["Dockerfile", "Dockerfile.cpu"]


@each_recipe
def test_serves(recipe: Path) -> None:
    assert instructions(recipe)[-1] == ("ENTRYPOINT", '["vllm", "serve"]')
    assert "Not built here: no container runtime." in recipe.read_text()


@each_recipe
def test_copies_what_is_there_and_what_is_not_ignored(recipe: Path) -> None:
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    sources = copied(recipe)
    assert "vllm_elastic" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


@each_recipe
def test_wheel_can_be_built_from_what_is_copied(recipe: Path) -> None:
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"]}
    there = {Path(path) for path in copied(recipe)}
    assert [path for path in needed if not there & {Path(path), *Path(path).parents}] == []


def test_vllm_image_is_one_that_the_project_supports() -> None:
    (image,) = re.findall(r"^ARG VLLM_IMAGE=vllm/vllm-openai:v(\S+)$", RECIPES[0].read_text(), re.M)
    (wanted,) = PROJECT["optional-dependencies"]["cuda"]
    assert image in SpecifierSet(wanted.removeprefix("vllm"))
    assert f"startswith('{image[:5]}')" in RECIPES[0].read_text(), "the check in the recipe"


@each_recipe
def test_extras_exist_and_leave_the_images_vllm_alone(recipe: Path) -> None:
    text = " ".join(rest for word, rest in instructions(recipe) if word == "RUN")
    (extras,) = re.findall(r"(?:vllm_elastic|\.)\[(\S+?)\]", text)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert ("cpu" in extras) == recipe.name.endswith(".cpu")
    assert "cuda" not in extras


@each_recipe
def test_documented_flags_exist(recipe: Path) -> None:
    """The `docker run` line of the comment: what follows the image is for `vllm serve`."""
    comment = re.sub(r"^# ?", "", recipe.read_text(), flags=re.M).replace("\\\n", " ")
    (command,) = re.findall(r"^ *docker run .*$", comment, re.M)
    (tag,) = re.findall(r"-t (\S+)", comment)
    words = shlex.split(command)
    args = parse_as_vllm_serve(words[words.index(tag) + 1 :])
    assert args.plugin == "elastic"
    assert tag.startswith(f"{PROJECT['name']}:{PROJECT['version']}")
