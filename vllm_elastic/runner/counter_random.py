# SPDX-License-Identifier: Apache-2.0
"""Random numbers as a function of a counter: no state, the same on every device and batch."""

from __future__ import annotations

import torch

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)


def uniform(seed: int, step: int, positions: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers in (0, 1), one for each position and token.

    SplitMix64 (Steele, Lea and Flood 2014) as a hash of seed, step, position and token id.

    Args:
        positions: int64 [W].

    Returns:
        float64 [W, count].
    """
    return numbers_of(streams_of(key_of(seed, step), positions), count)


def numbers_of(streams: torch.Tensor, count: int) -> torch.Tensor:
    """float64 [W, count] in (0, 1) of streams, int64 [W]."""
    tokens = torch.arange(1, count + 1, dtype=torch.int64, device=streams.device)
    bits = _mix(streams[:, None] + tokens[None] * _signed(_GOLDEN))
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def key_of(seed: int, step: int) -> int:
    """What a request's random numbers of a denoising step begin with, an int64."""
    return _signed(_mix_int(_mix_int(seed & _MASK64) + (step + 1) * _GOLDEN))


def streams_of(keys: torch.Tensor | int, positions: torch.Tensor) -> torch.Tensor:
    """What each position's numbers begin with, int64 [W].

    Args:
        keys: ``key_of``, one for all or int64 [W]; positions: int64 [W].
    """
    return _mix(positions * _signed(_GOLDEN) + keys)


def _mix(z: torch.Tensor) -> torch.Tensor:
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return z ^ _shifted(z, _SHIFTS[2])


def _mix_int(z: int) -> int:
    """``_mix`` for one Python integer."""
    z &= _MASK64
    for shift, factor in zip(_SHIFTS[:2], _FACTORS, strict=True):
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return z ^ (z >> _SHIFTS[2])


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift right: torch's int64 shift repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value
