# SPDX-License-Identifier: Apache-2.0
"""The table of sampling parameters against the installed vLLM and the docs."""

from __future__ import annotations

from pathlib import Path

from vllm.sampling_params import SamplingParams

from vllm_elastic.engine.sampling_rules import RULES, table

ROOT = Path(__file__).parent.parent


def test_every_parameter_has_a_rule() -> None:
    """A parameter that a new vLLM brings would be accepted and ignored."""
    fields = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert fields == set(RULES)


def test_rules_say_something() -> None:
    for name, rule in RULES.items():
        assert rule.status in ("kept", "deviates", "refused"), name
        assert rule.note or rule.status == "kept", name
        assert bool(rule.neutral) == (rule.status == "refused"), name


def test_defaults_of_refused_parameters_are_accepted() -> None:
    params = SamplingParams()
    for name, rule in RULES.items():
        if rule.status == "refused":
            assert getattr(params, name) in rule.neutral, name


def test_page_is_current() -> None:
    page = (ROOT / "docs/sampling-parameters.md").read_text()
    written_by = "python -m vllm_elastic.engine.sampling_rules > docs/sampling-parameters.md"
    assert page == table(), written_by
