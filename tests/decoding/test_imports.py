# SPDX-License-Identifier: Apache-2.0
"""decoding/ and config.py stand alone, and config.py without decoding/."""

from __future__ import annotations

import subprocess
import sys

IMPORT_ALL = """
import importlib, pkgutil, sys
import vllm_elastic.config, vllm_elastic.decoding as package
names = [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
assert len(names) >= 8, names
for name in names:
    importlib.import_module(name)
heavy = [m for m in ("torch", "vllm", "transformers") if m in sys.modules]
assert not heavy, f"imported: {heavy}"
"""


def test_decoding_imports_neither_torch_nor_vllm() -> None:
    """The simulator and these tests would need torch and seven seconds to start."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_config_does_not_import_decoding() -> None:
    """They would import each other: a policy reads the config."""
    script = "import sys, vllm_elastic.config; assert 'vllm_elastic.decoding' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
