# SPDX-License-Identifier: Apache-2.0
"""Every patch to vLLM has its record, and its row in the list of records."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_module_has_a_record_of_its_name() -> None:
    """A patch would outlive its reason, with nobody knowing when it can go."""
    modules = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "vllm_elastic" / "patches").iterdir()
        if not path.name.startswith("__")
    } - {"wrapping"}  # what the others share
    records = {path.parent.name for path in (ROOT / "patches").glob("*/README.md")}
    assert modules <= records
    listed = (ROOT / "patches" / "README.md").read_text()
    assert all(f"({name}/README.md)" in listed for name in records)
