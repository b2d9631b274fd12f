# SPDX-License-Identifier: Apache-2.0
"""The studies' command lines, as the docs have them."""

from __future__ import annotations

from types import ModuleType

import drift
import host_time
import ideal
import images
import pytest

from tests.documented_commands import arguments, documented


@pytest.mark.parametrize(
    "study", [drift, host_time, ideal, images], ids=lambda study: study.__name__
)
def test_documented_commands_are_understood(study: ModuleType) -> None:
    commands = documented(f"python examples/studies/{study.__name__}.py")
    assert commands
    for command in commands:
        assert study.make_parser().parse_args(arguments(command)).model
