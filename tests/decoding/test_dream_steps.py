# SPDX-License-Identifier: Apache-2.0
"""Dream's own schedule: how many it commits, and which."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden import dream_steps
from vllm_elastic.config import ALGORITHMS, ElasticConfig
from vllm_elastic.decoding.canvas import Canvas
from vllm_elastic.decoding.dream_steps import DreamSteps
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.schedule import growth_of, make_schedule

PROMPT = 3


def decode(
    tokens: int, confidences: list[float], seed: int = 0, **knobs: Any
) -> tuple[list[list[int]], Canvas]:
    """Answer positions committed in each step, the confidences being the same at every step."""
    config = ElasticConfig.from_dict({"policy": "none", **knobs})
    schedule = make_schedule(config, tokens, seed)
    assert isinstance(schedule, DreamSteps)
    canvas = Canvas([1] * PROMPT, tokens, 99)
    committed = []
    while not canvas.done:
        window = schedule.window(canvas)
        assert window.tolist() == np.flatnonzero(canvas.masked).tolist()
        at = np.array(confidences)[(window - PROMPT) % len(confidences)]
        predictions = Predictions(window, np.full(len(window), 5, dtype=np.int32), at)
        chosen = window[schedule.choose(canvas, predictions, len(committed))]
        canvas.commit(chosen, np.full(len(chosen), 5, dtype=np.int32))
        committed.append((chosen - PROMPT).tolist())
    return committed, canvas


@pytest.mark.parametrize(("masks", "steps", "shares"), dream_steps.SHARES)
def test_shares_by_hand(masks: int, steps: int, shares: list[int]) -> None:
    for alg in ("maskgit_plus", "topk_margin", "entropy"):
        for alg_temp in (0.0, 0.5):
            found, _ = decode(masks, [0.5, 0.4], steps=steps, alg=alg, alg_temp=alg_temp)
            assert [len(committed) for committed in found] == shares


@pytest.mark.parametrize("alg", dream_steps.DECODED)
def test_decoded_by_hand(alg: str) -> None:
    """As many steps as tokens, where none is named."""
    found, _ = decode(4, dream_steps.CONFIDENCES[alg], alg=alg)
    assert found == dream_steps.DECODED[alg]


@settings(deadline=None)
@given(
    tokens=st.integers(1, 40),
    steps=st.integers(1, 60),
    alg=st.sampled_from(ALGORITHMS),
    alg_temp=st.sampled_from([0.0, 0.1, 10.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_it_ends_in_time_and_commits_all_once(
    tokens: int, steps: int, alg: str, alg_temp: float, seed: int
) -> None:
    knobs = {"steps": steps, "alg": alg, "alg_temp": alg_temp}
    found, canvas = decode(tokens, [0.3, -2.0, 0.9], seed, **knobs)
    assert len(found) <= steps and canvas.done
    assert sorted(itertools.chain(*found)) == list(range(tokens))
    assert decode(tokens, [0.3, -2.0, 0.9], seed, **knobs)[0] == found


def one_step(step: int, confidences: list[float], count: int, **knobs: Any) -> list[list[int]]:
    """What ``count`` seeds commit in one of 4 steps, of as many masks as there are confidences."""
    config, masks = ElasticConfig.from_dict(knobs), len(confidences)
    canvas = Canvas([1] * PROMPT, masks, 99)
    window = canvas.first_masked(masks)
    schedules = [DreamSteps(config, 4, seed) for seed in range(count)]
    tokens = np.full(len(window), 5, dtype=np.int32)
    predictions = Predictions(window, tokens, np.array(confidences))
    return [s.choose(canvas, predictions, step).tolist() for s in schedules]


def test_origin_commits_by_chance() -> None:
    """Of 8 masks in the first of 4 steps 0.24975 each: numbers and places of 4,000 seeds."""
    found = one_step(0, [0.5] * 8, 4000, alg="origin")
    share, count = 0.24975, 8 * 4000
    seen = np.bincount(np.concatenate(found).astype(int), minlength=8)
    assert abs(seen.sum() - count * share) < 5 * math.sqrt(count * share * (1 - share))
    expected = seen.sum() / 8
    assert float(((seen - expected) ** 2 / expected).sum()) < 7 + 5 * math.sqrt(14)
    spread = np.var([len(committed) for committed in found])
    assert spread == pytest.approx(8 * share * (1 - share), rel=0.15), "not independent"


def test_alg_temp_draws_without_replacement() -> None:
    """Pairs that the second of 4 steps commits of 7 masks, against one draw after the other."""
    confidences, alg_temp, count = [0.9, 0.7, 0.6, 0.5, 0.4, -0.3, -0.2], 0.4, 6000
    weights = np.exp(np.array(confidences) / alg_temp)
    weights /= weights.sum()
    found = one_step(1, confidences, count, alg="maskgit_plus", alg_temp=alg_temp)
    chi, chances = 0.0, 0.0
    for a, b in itertools.combinations(range(7), 2):
        chance = weights[a] * weights[b] * (1 / (1 - weights[a]) + 1 / (1 - weights[b]))
        chances += chance
        chi += (found.count([a, b]) - count * chance) ** 2 / (count * chance)
    assert chances == pytest.approx(1)
    assert chi < 20 + 5 * math.sqrt(2 * 20)


def test_a_low_alg_temp_is_none() -> None:
    confidences = dream_steps.CONFIDENCES["entropy"]
    found, _ = decode(4, confidences, 7, alg="entropy", alg_temp=1e-4)
    assert found == dream_steps.DECODED["entropy"]


@pytest.mark.parametrize(
    ("knobs", "tokens", "names"),
    [
        ({"policy": "dual-cache"}, 8, ["elastic_alg", "dual-cache"]),
        ({"confidence_eos_eot_inf": True}, 8, ["elastic_alg", "elastic_confidence_eos_eot_inf"]),
        ({"max_window": 32}, 33, ["max_tokens 33", "elastic_alg", "'max_window' 32"]),
    ],
)
def test_what_does_not_go_together(knobs: dict[str, Any], tokens: int, names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make_schedule(ElasticConfig.from_dict({"alg": "entropy", **knobs}), tokens)
    assert all(name in str(error.value) for name in names)


def test_an_answer_does_not_grow_under_it() -> None:
    """Its times are those of one canvas: it would commit whatever is appended at once."""
    config = ElasticConfig.from_dict({"alg": "entropy"})
    assert growth_of(config, own=32) == 0
    with pytest.raises(ValueError, match="'elastic_grow_by' and 'elastic_alg' do not go together"):
        growth_of(ElasticConfig.from_dict({"alg": "entropy", "grow_by": 32}), own=0)
