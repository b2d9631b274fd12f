# SPDX-License-Identifier: Apache-2.0
"""Every tensor that the engine and its oracles make says on which device.

Without one it is on the CPU, which no test on a CPU sees and every pass on a GPU does.
"""

from __future__ import annotations

import ast

import pytest
import torch
from torch.utils._device import _device_constructors

from tests.own_process import ROOT, printed_by

PACKAGE = ROOT / "vllm_elastic"
FOLDERS = ["attention", "engine", "models", "reference", "runner"]

CONSTRUCTORS = {function.__name__ for function in _device_constructors()}
"""What takes torch's default device where none is named, as torch itself lists it."""


def without_device(source: str) -> list[int]:
    """Lines that make a tensor on whatever device is torch's default.

    A module's parameters are left out: vLLM builds modules with the model's device as default.
    """
    tree = ast.parse(source)
    parameters = {
        id(argument)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("nn.Parameter")
        for argument in call.args
    }
    return [
        call.lineno
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in CONSTRUCTORS
        and id(call) not in parameters
        and "device" not in [keyword.arg for keyword in call.keywords]
    ]


def test_no_tensor_is_made_on_the_default_device() -> None:
    files = [path for folder in FOLDERS for path in sorted((PACKAGE / folder).rglob("*.py"))]
    assert len(files) > 60
    lines = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in files
        for line in without_device(path.read_text())
    ]
    assert not lines


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.zeros(3)", True),
        ("x[torch.arange(len(x))]", True),
        ("torch.tensor([1], dtype=torch.int64).to(x.device)", True),
        ("torch.full((2, 3), 0.5, **options)", True),
        ("torch.zeros(3, device=x.device)", False),
        ("torch.zeros_like(x)", False),
        ("x.new_zeros(3)", False),
        ("nn.Parameter(torch.empty(width))", False),
    ],
)
def test_what_is_found(line: str, found: bool) -> None:
    assert without_device(f"def work(x):\n    {line}\n") == ([2] if found else [])


def test_torch_lists_what_is_used() -> None:
    """The list is private: were it cut, nothing would be found any more."""
    assert {"arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros"} <= CONSTRUCTORS
    with torch.device("meta"):
        assert torch.arange(3).is_meta and torch.tensor([1]).is_meta


ON_SECOND_DEVICE = [
    *(
        f"tests/runner/test_{name}.py"
        for name in ("totals", "batch", "head", "candidates", "upload")
    ),
    *(f"tests/reference/test_reference_{name}.py" for name in ("devices", "diffusion")),
    "tests/engine/test_second_device.py",
]


@pytest.mark.slow
def test_on_a_device_that_is_not_the_cpu() -> None:
    """What the host has and what the device has would meet in one operator, numbers would be read
    that were not fetched, or be used before they are sent: ``tests/second_device.py``.

    In a process of its own: torch is told of the device once and for all.
    """
    printed_by("pytest", "-q", "--disable-warnings", *ON_SECOND_DEVICE, ON_SECOND_DEVICE="1")
