# SPDX-License-Identifier: Apache-2.0
"""The kernel that chooses candidates, against torch's operators: in Triton's interpreter, or on a
GPU where there is one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests import triton_interpreter  # noqa: F401
from tests.device import DEVICE
from vllm_elastic.runner.candidate_kernel import most_probable_by_kernel
from vllm_elastic.runner.candidates import most_probable

from . import softmaxes


@pytest.mark.parametrize("name", softmaxes.CASES)
def test_against_float64(name: str) -> None:
    softmaxes.check(most_probable_by_kernel, softmaxes.CASES[name]().to(DEVICE))


def test_of_equal_logits_the_first() -> None:
    """Within a block of the kernel, across blocks, and where the last one is not full."""
    logits = torch.zeros(4, 5000, device=DEVICE)
    for row, places in enumerate([(3, 2047), (2048 + 9, 7), (4999, 4097), (6, 4102)]):
        logits[row, list(places)] = 2.0
    assert most_probable_by_kernel(logits)[0].tolist() == [3, 7, 4097, 6]


def test_rows_of_a_wider_tensor() -> None:
    """A vocabulary is filled up to a multiple of 64: what is behind it is no token."""
    wide = torch.full((5, 320), 90.0)
    wide[:, :300] = torch.randn(5, 300, generator=torch.Generator().manual_seed(2))
    token_ids, probabilities = most_probable_by_kernel(wide.to(DEVICE)[:, :300])
    wanted = most_probable(wide[:, :300])
    assert torch.equal(token_ids.cpu(), wanted[0])
    torch.testing.assert_close(probabilities.cpu(), wanted[1], rtol=0, atol=2.0**-20)


def test_a_row_alone_has_the_same_number() -> None:
    logits = torch.randn(7, 3000, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    together = most_probable_by_kernel(logits)[1]
    alone = [most_probable_by_kernel(logits[row : row + 1])[1] for row in range(7)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("place", [0, 2999])
def test_broken_rows(place: int) -> None:
    """A NaN, an infinity, or nothing that is allowed: as torch's operators say it."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(6))
    logits[1, place] = float("nan")
    logits[2, place] = float("inf")
    logits[3] = float("-inf")
    token_ids, probabilities = most_probable_by_kernel(logits.to(DEVICE))
    assert torch.isnan(probabilities).tolist() == [False, True, True, True]
    assert torch.isnan(most_probable(logits)[1]).tolist() == [False, True, True, True]
    assert ((token_ids >= 0) & (token_ids < 3000)).all()
