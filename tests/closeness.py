# SPDX-License-Identifier: Apache-2.0
"""The one way in which tests compare tensors that need not agree to the last bit."""

from __future__ import annotations

import torch


def assert_close(name: str, actual: torch.Tensor, expected: torch.Tensor, ratio: float) -> None:
    """Fail unless shapes agree and ||actual - expected|| <= ratio * ||expected||, Frobenius norms.

    A NaN or an infinity in ``actual`` fails, also where ``expected`` has one.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    )
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().all(), f"{name}: {int((~actual.isfinite()).sum())} not finite"
    error = (actual - expected).norm().item()
    allowed = ratio * expected.norm().item()
    assert error <= allowed, (
        f"{name}: error {error:.3g} > {allowed:.3g}, "
        f"largest difference {(actual - expected).abs().max().item():.3g}"
    )
