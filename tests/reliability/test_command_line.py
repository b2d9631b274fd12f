# SPDX-License-Identifier: Apache-2.0
"""The command lines of the long forms, as `make` and the docs have them."""

from __future__ import annotations

import shlex
from types import ModuleType

import pytest

from tests.documented_commands import ROOT
from tests.reliability import fuzz, soak
from tests.reliability.__main__ import make_parser


@pytest.mark.parametrize(
    ("target", "module", "knob"), [("soak", soak, "minutes"), ("fuzz", fuzz, "requests")]
)
def test_make_target(target: str, module: ModuleType, knob: str) -> None:
    (line,) = [
        line.split("tests.reliability ", 1)[1]
        for line in (ROOT / "Makefile").read_text().splitlines()
        if f"tests.reliability {target}" in line
    ]
    words = shlex.split(line.replace(f"$({knob.upper()})", "7"))
    args = make_parser().parse_args(words)
    assert args.function is module.main
    assert getattr(args, knob) == 7
