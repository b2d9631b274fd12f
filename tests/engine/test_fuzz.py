# SPDX-License-Identifier: Apache-2.0
"""Any `SamplingParams` and any prompt, through the `LLM` API: refused or served, nothing else.

And a queue of hundreds over a cache for a few, with nothing left of it.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reliability.json_values import INTEGERS, NUMBERS
from tests.reliability.malformed import KNOB_NAMES, KNOB_VALUES

from .conftest import EOS, MASK, Served
from .driver import Driver, assert_nothing_left, prompt_of

pytestmark = pytest.mark.engine

TOKEN_IDS = st.integers(-1, 300) | st.sampled_from([EOS, MASK, 292, 293, 2**31, 2**63, 2**70])
BIASES = NUMBERS | st.sampled_from([-100.0, 100.0, 1e4])

PARAMETERS: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(-1, 3),
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "top_k": INTEGERS,
    "min_p": NUMBERS,
    "seed": INTEGERS,
    "max_tokens": INTEGERS | st.none(),
    "min_tokens": st.integers(0, 7) | INTEGERS,
    "stop_token_ids": st.lists(TOKEN_IDS, max_size=3) | st.just(list(range(293))),
    "allowed_token_ids": st.lists(TOKEN_IDS, max_size=3)
    | st.sampled_from([[EOS], [MASK], [EOS, MASK], [5]]),
    "logit_bias": st.dictionaries(TOKEN_IDS, BIASES, max_size=3)
    | st.sampled_from([dict.fromkeys(range(293), bias) for bias in (-1e38, 1e4, float("-inf"))]),
    "logprobs": st.integers(-2, 25),
    "prompt_logprobs": st.integers(-1, 2),
    "presence_penalty": NUMBERS,
    "ignore_eos": st.booleans(),
    "extra_args": st.dictionaries(st.sampled_from(KNOB_NAMES), KNOB_VALUES, max_size=3),
}
PROMPTS = st.lists(st.integers(0, 289), min_size=1, max_size=40) | st.lists(TOKEN_IDS, max_size=3)


@pytest.fixture
def driver(serve: Callable[[str], Served]) -> Driver:
    return Driver(serve("gqa-tied"))


@pytest.mark.slow
def test_any_request_is_refused_or_served(driver: Driver) -> None:
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError

    llm = driver.engine.llm
    good = {"prompt_token_ids": prompt_of(11, 1)}
    good_params = SamplingParams(
        temperature=0.7,
        seed=5,
        max_tokens=12,
        detokenize=False,
        extra_args={"elastic_gamma": 0.9, "elastic_tokens_per_step": 4},
    )

    def tokens(outputs: list[Any]) -> list[int]:
        return list(outputs[0].outputs[0].token_ids)

    right = tokens(llm.generate([good], [good_params], use_tqdm=False))
    seen = {"served": 0, "refused": 0}

    @settings(
        max_examples=200,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(PROMPTS, st.fixed_dictionaries({}, optional=PARAMETERS))
    def check(prompt: list[int], options: dict[str, Any]) -> None:
        defaults = {"max_tokens": 6, "temperature": 0.0, "detokenize": False}
        # A legal request may want a canvas of 250: let it take few steps.
        knobs = {"elastic_tokens_per_step": 32, **options.get("extra_args", {})}
        try:
            params = SamplingParams(**{**defaults, **options, "extra_args": knobs})
            outputs = llm.generate(
                [good, {"prompt_token_ids": prompt}], [good_params, params], use_tqdm=False
            )
        except (VLLMClientError, ValueError, TypeError):  # whatever else is raised is a bug
            seen["refused"] += 1
            outputs = llm.generate([good], [good_params], use_tqdm=False)
        else:
            seen["served"] += 1
            for copy in outputs[1].outputs:
                assert copy.finish_reason in ("stop", "length")
                assert MASK not in copy.token_ids and max(copy.token_ids, default=0) < 293
        assert tokens(outputs) == right
        assert_nothing_left(driver)

    check()
    assert seen["served"] > 10 and seen["refused"] > 10, seen


def test_hundreds_over_a_cache_for_a_few(driver: Driver) -> None:
    """A queue of 250, a third of it aborted at any stage: drained, the same answers, no object."""
    from vllm_elastic.decoding.request import DenoisingRequest

    def requests_alive() -> int:
        gc.collect()
        return sum(type(o) is DenoisingRequest for o in gc.get_objects())

    before = requests_alive()  # other tests keep some to compare with
    sizes = [(10 + 7 * i, 6 + 5 * i) for i in range(6)]
    knobs: list[dict[str, Any]] = [{"gamma": 0.9}, {"policy": "none"}, {"gamma": 1.1}]
    cases = [(prompt, canvas, knob) for prompt, canvas in sizes for knob in knobs]

    def add(case: int) -> str:
        prompt, canvas, knob = cases[case]
        return driver.add(prompt_of(prompt, case), canvas, tokens_per_step=6, **knob)

    alone = []
    for case in range(len(cases)):
        name = add(case)
        driver.run()
        alone.append(driver.tokens[name])
    rng = random.Random(0)
    pool = driver.engine.scheduler.kv_cache_manager.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - 14)
    try:
        names = {add(i % len(cases)): i % len(cases) for i in range(250)}
        aborted: set[str] = set()
        while driver.llm_engine.has_unfinished_requests():
            driver.step()
            gone = [n for n in names if n not in driver.finished and rng.random() < 0.01]
            aborted.update(gone)
            driver.llm_engine.abort_request(gone)
    finally:
        pool.free_blocks(taken)
    for name, case in names.items():
        if name not in aborted:
            assert driver.tokens[name] == alone[case]
        else:
            assert driver.tokens[name] == alone[case][: len(driver.tokens[name])]
    assert 20 < len(aborted) < 230
    assert_nothing_left(driver)
    assert requests_alive() <= before
