# SPDX-License-Identifier: Apache-2.0
"""Schedules: what a step predicts and commits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import Canvas
from vllm_elastic.decoding.schedule import FixedSteps, make_schedule


def decode(config: ElasticConfig, tokens: int, seed: int = 0) -> list[list[int]]:
    """Commits of each step, with confidences that depend on the step and position only."""
    canvas = Canvas([1, 2, 3], tokens, 99)
    schedule = make_schedule(config, tokens, seed)
    steps = []
    while not canvas.done:
        window = schedule.window(canvas)
        confidence = np.random.default_rng(len(steps)).random(canvas.length)[window]
        chosen = schedule.choose(canvas, window, confidence, len(steps))
        canvas.commit(window[chosen], np.full(len(chosen), 5, dtype=np.int32))
        steps.append(window[chosen].tolist())
    return steps


@given(
    length=st.integers(1, 9), blocks=st.integers(1, 4), share=st.integers(1, 9), rand=st.booleans()
)
def test_fixed_steps_takes_as_many_and_stays_in_its_blocks(
    length: int, blocks: int, share: int, rand: bool
) -> None:
    share = min(share, length)
    remasking = "random" if rand else "low_confidence"
    values = {"steps": share * blocks, "block_length": length, "remasking": remasking}
    steps = decode(ElasticConfig.from_dict(values), length * blocks)
    assert len(steps) == share * blocks
    base, rest = divmod(length, share)
    for number, committed in enumerate(steps):
        block, inside = divmod(number, share)
        assert len(committed) == base + (inside < rest)
        assert all((position - 3) // length == block for position in committed)


def test_random_remasking_depends_on_the_seed_only() -> None:
    values = {"steps": 6, "block_length": 12, "remasking": "random"}
    config = ElasticConfig.from_dict(values)
    assert decode(config, 12, seed=4) == decode(config, 12, seed=4)
    assert decode(config, 12, seed=4) != decode(config, 12, seed=5)
    assert decode(config, 12, seed=-2) == decode(config, 12, seed=-2)
    assert decode(config, 12, seed=-2) != decode(config, 12, seed=-3)


@pytest.mark.parametrize(
    ("values", "tokens", "names"),
    [
        ({"steps": 8, "block_length": 5}, 32, ["elastic_block_length", "max_tokens 32"]),
        ({"steps": 3, "block_length": 16}, 32, ["elastic_steps", "2 blocks"]),
        ({"steps": 64, "block_length": 16}, 32, ["elastic_steps", "more than max_tokens 32"]),
    ],
)
def test_what_llada_asserts_is_an_error(
    values: dict[str, int], tokens: int, names: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        FixedSteps(ElasticConfig.from_dict(values), tokens)
    assert all(name in str(error.value) for name in names)
