# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter as far as it is mended here; on a GPU kernels are compiled instead."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.device import ON_CARD

triton = pytest.importorskip("triton")


def mend_bfloat16() -> None:
    """Up to Triton 3.9 its ``tl.dot`` multiplies bfloat16's bit patterns as whole numbers."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16 or handle.data.dtype != np.uint16:
            return handle
        # A bfloat16 is the upper half of a float32.
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = mended


if not ON_CARD:
    mend_bfloat16()
