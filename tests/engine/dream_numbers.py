# SPDX-License-Identifier: Apache-2.0
"""The engine's random numbers once more, from their description, for the oracle.

* Of a token: SplitMix64 as a hash. With G = 0x9E3779B97F4A7C15 and mix its output function: key =
  mix(mix(seed) + (step + 1) G), stream = mix(key + position G), bits = mix(stream + (token + 1) G);
  the number is (bits / 2^11 rounded down + 0.5) / 2^53.
* Of a position: numpy's Philox with the key (seed, step), the canvas position's number in order.
"""

from __future__ import annotations

import numpy as np
import torch

GOLDEN = 0x9E3779B97F4A7C15
ALL = (1 << 64) - 1


def mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def of_integer(value: int) -> np.ndarray:
    return np.array([value & ALL], dtype=np.uint64)


class EnginesNumbers:
    """For ``vllm_elastic.reference.diffusion``."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def of_tokens(self, step: int, positions: torch.Tensor, count: int) -> torch.Tensor:
        golden = np.uint64(GOLDEN)
        key = mix(mix(of_integer(self.seed)) + of_integer((step + 1) * GOLDEN))
        streams = mix(key + positions.numpy().astype(np.uint64) * golden)
        tokens = np.arange(1, count + 1, dtype=np.uint64) * golden
        bits = mix(streams[:, None] + tokens[None]) >> np.uint64(11)
        return torch.from_numpy((bits.astype(np.float64) + 0.5) / 2.0**53)

    def of_positions(self, step: int, count: int) -> torch.Tensor:
        key = np.array([self.seed & ALL, step], dtype=np.uint64)
        numbers = np.random.Generator(np.random.Philox(key=key)).random(count)
        return torch.from_numpy(numbers.clip(2.0**-53))
