# SPDX-License-Identifier: Apache-2.0
"""Schedules: what a step predicts and commits."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.golden import fixed_steps
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.canvas import Canvas, Positions
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.schedule import FixedSteps, LeftToRight, make_schedule


def predicted(window: Positions, confidence: npt.NDArray[np.float64]) -> Predictions:
    return Predictions(window, np.full(len(window), 5, dtype=np.int32), confidence)


def decode(config: ElasticConfig, tokens: int, seed: int = 0) -> list[list[int]]:
    """Commits of each step, with confidences that depend on the step and position only."""
    canvas = Canvas([1, 2, 3], tokens, 99)
    schedule = make_schedule(config, tokens, seed)
    steps = []
    while not canvas.done:
        window = schedule.window(canvas)
        confidence = np.random.default_rng(len(steps)).random(canvas.length)[window]
        chosen = schedule.choose(canvas, predicted(window, confidence), len(steps))
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


def golden_decode(steps: int, block_length: int, remasking: str) -> list[list[int]]:
    """Answer positions committed in each step, with the golden file's confidences."""
    values = {"steps": steps, "block_length": block_length, "remasking": remasking}
    confidence = np.array(fixed_steps.CONFIDENCE)
    prompt = fixed_steps.PROMPT_LENGTH
    canvas = Canvas([1] * prompt, len(confidence), 99)
    schedule = make_schedule(ElasticConfig.from_dict(values), len(confidence), 0)
    committed = []
    while not canvas.done:
        window = schedule.window(canvas)
        known = predicted(window, confidence[window - prompt])
        chosen = schedule.choose(canvas, known, len(committed))
        canvas.commit(window[chosen], np.full(len(chosen), 5, dtype=np.int32))
        committed.append((window[chosen] - prompt).tolist())
    return committed


@pytest.mark.parametrize(("steps", "block_length", "committed"), fixed_steps.LOW_CONFIDENCE)
def test_low_confidence_by_hand(steps: int, block_length: int, committed: list[list[int]]) -> None:
    assert golden_decode(steps, block_length, "low_confidence") == committed


@pytest.mark.parametrize(("steps", "block_length", "shares"), fixed_steps.RANDOM)
def test_random_remasking_by_hand(
    steps: int, block_length: int, shares: list[tuple[int, int]]
) -> None:
    committed = golden_decode(steps, block_length, "random")
    assert [(len(c), c[0] // block_length) for c in committed] == shares
    assert all(p // block_length == c[0] // block_length for c in committed for p in c)
    assert sorted(p for c in committed for p in c) == list(range(len(fixed_steps.CONFIDENCE)))


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


class Rising:
    """Tokens that only grow."""

    def allowed(self) -> npt.NDArray[np.int32]:
        raise NotImplementedError

    def count_accepted(self, token_ids: list[int]) -> int:
        falls = [b < a for a, b in pairwise(token_ids)]
        return 1 + falls.index(True) if True in falls else len(token_ids)


@pytest.mark.parametrize(
    ("token_ids", "probabilities", "committed"),
    [
        ([3, 4, 5, 6], [0.9, 0.9, 0.9, 0.9], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [0.1, 0.9, 0.9, 0.9], [0, 1, 2, 3]),  # the first is, sure or not
        ([3, 4, 5, 6], [0.9, 0.9, 0.1, 0.9], [0, 1]),  # no gap
        ([3, 4, 2, 6], [0.9, 0.9, 0.9, 0.9], [0, 1]),  # the grammar refuses the third
        ([3, 2, 4, 6], [0.1, 0.1, 0.1, 0.9], [0]),
    ],
)
def test_left_to_right_by_hand(
    token_ids: list[int], probabilities: list[float], committed: list[int]
) -> None:
    schedule = make_schedule(ElasticConfig.from_dict({"commit": "threshold"}), 4)
    canvas = Canvas([7, 7], 4, 99)
    predictions = Predictions(
        LeftToRight(schedule, Rising()).window(canvas),
        np.array(token_ids, dtype=np.int32),
        np.array(probabilities),
    )
    chosen = LeftToRight(schedule, Rising()).choose(canvas, predictions, 0)
    assert chosen.tolist() == committed
