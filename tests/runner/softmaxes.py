# SPDX-License-Identifier: Apache-2.0
"""Logits of every kind, and how near float64's softmax a most probable token's has to be."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def _random(scale: float, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(vocab)
    return (scale * torch.randn(16, vocab, generator=generator, device="cpu")).to(dtype)


def _above(margin: float, vocab: int) -> torch.Tensor:
    """One token, another in each row, so far above many."""
    logits = _random(1.0, vocab)
    logits[range(16), range(16)] = logits.amax(dim=-1) + margin
    return logits


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "flat": lambda: _random(0.01, 5000),
    "even": lambda: _random(3.0, 20_000),
    "large": lambda: _random(30.0, 5000) + 500.0,
    "small": lambda: _random(2.0, 23),
    "bfloat16": lambda: _random(4.0, 5000, torch.bfloat16),
    "half sure": lambda: _above(5.0, 5000),
    "sure": lambda: _above(12.0, 2048),
    "all but sure": lambda: _above(28.0, 2049),
    "surer than float64 can say": lambda: _above(50.0, 4096),
    "almost all forbidden": lambda: _random(1.0, 3000).index_fill_(
        -1, torch.arange(5, 3000, device="cpu"), float("-inf")
    ),
}


def check(
    most_probable: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], logits: torch.Tensor
) -> None:
    """Within the bounds that ``candidates.most_probable`` states."""
    token_ids, found = (each.cpu() for each in most_probable(logits))
    logits = logits.cpu()
    assert torch.equal(token_ids, logits.argmax(dim=-1))
    odds = (logits.double() - logits.double().amax(dim=-1, keepdim=True)).exp()
    # Of the others: 1 less a probability near 1 would have lost it.
    rest = odds.scatter(-1, token_ids[:, None], 0.0).sum(dim=-1)
    p = 1 / (1 + rest)
    off = (found - p).abs()
    steps = torch.log(logits.shape[-1] / rest) + 1
    assert (off <= p * p * rest * steps * 2.0**-22 + 2.0**-50).all()
    assert off.max() < 2.0**-20 and math.isfinite(float(off.max()))
