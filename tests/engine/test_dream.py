# SPDX-License-Identifier: Apache-2.0
"""Dream through the engine: its own samplers against the oracle, and what the shift might break.

Policies, batches and text blocks: ``test_oracle.py``; ranks: ``test_tensor_parallel.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_elastic.config import ALGORITHMS
from vllm_elastic.models.registry import traits_of
from vllm_elastic.reference import DiffusionOptions, diffusion

from .agreement import TIE, steps_of
from .conftest import EOS, MASK, Served, poison
from .dream_numbers import EnginesNumbers
from .driver import Driver, assert_nothing_left, prompt_of

pytestmark = pytest.mark.engine

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "warm": {"temperature": 0.8, "top_p": 0.9},
    "hot": {"temperature": 1.5, "top_k": 20},
}


@pytest.fixture
def driver(serve: Callable[[str], Served]) -> Driver:
    return Driver(serve("dream"))


def test_own_samplers_equal_oracle(serve: Callable[[str], Served], driver: Driver) -> None:
    """All of them in one batch: every step's commits and the answer up to its end. The oracle
    is given the engine's random numbers, made once more."""
    served = serve("dream")
    poison(served.engine)
    # Prompt, max_tokens, steps; five, so that each falls to other samplings.
    shapes = [(7, 16, None), (33, 13, 5), (1, 24, 24), (20, 9, 9), (8, 3, 1)]
    cases = list(itertools.product(ALGORITHMS, (0.0, 0.2), SAMPLINGS))
    names = []
    for seed, (alg, alg_temp, sampling) in enumerate(cases):
        shape = seed % len(shapes)
        size, max_tokens, steps = shapes[shape]
        knobs = {"policy": "none", "alg": alg, "alg_temp": alg_temp, "steps": steps}
        options = {"seed": seed + 1, **SAMPLINGS[sampling]}
        names.append(driver.add(prompt_of(size, shape), max_tokens, options, **knobs))
    driver.run()
    records = driver.take_records()
    ties = 0
    answers = set()
    for seed, (name, (alg, alg_temp, sampling)) in enumerate(zip(names, cases, strict=True)):
        shape = seed % len(shapes)
        size, max_tokens, steps = shapes[shape]
        options = DiffusionOptions(steps or max_tokens, alg, alg_temp, **SAMPLINGS[sampling])  # type: ignore[arg-type]
        prompt = prompt_of(size, shape)
        expected = diffusion(served.oracle, prompt, max_tokens, options, EnginesNumbers(seed + 1))
        found, wanted = records[name].steps, [dict(entry) for entry in expected.steps]
        tokens = [token for token in driver.tokens[name] if token != EOS]
        answers.add((shape, tuple(tokens)))
        if steps_of(found) == steps_of(wanted[: len(found)]) and tokens == expected.token_ids:
            assert len(found) == len(wanted) or EOS in driver.tokens[name]
            continue
        assert min(expected.margins) < TIE, (name, cases[seed])
        ties += 1
    assert ties <= 1
    assert len(answers) > len(cases) / 2, "they hardly differ"
    assert_nothing_left(driver)


@pytest.mark.parametrize("policy", ["interval", "elastic", "elastic-block"])
def test_own_sampler_over_a_cache(policy: str, driver: Driver) -> None:
    """Steps that commit nothing, and windows of a whole answer; alone and in a batch the same."""

    def asks() -> list[str]:
        return [
            driver.add(
                prompt_of(5 + 9 * i, i),
                11 + 4 * i,
                {"seed": i, "temperature": 0.5 * (i % 2)},
                **{"policy": policy, "alg": ALGORITHMS[i], "steps": (None, 9, 19, 12)[i]},
            )
            for i in range(4)
        ]

    poison(driver.engine)
    scheduler = driver.engine.scheduler
    together = asks()
    driver.run()
    limit, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 1
    try:
        alone = asks()
        driver.run()
    finally:
        scheduler.max_num_active_reqs = limit
    records = driver.take_records()
    for one, other in zip(together, alone, strict=True):
        assert driver.tokens[one] == driver.tokens[other]
        assert steps_of(records[one].steps) == steps_of(records[other].steps)
    idle = [s for name in together for s in records[name].steps if not s["committed"]]
    assert any(step["kind"] != "replay" for step in idle), "every step committed something"
    assert_nothing_left(driver)


def test_refused_at_admission(driver: Driver) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="'elastic_alg' and policy 'dual-cache'"):
        driver.add(prompt_of(4, 1), 8, alg="entropy", policy="dual-cache")
    with pytest.raises(VLLMValidationError, match="prompt cannot be empty"):
        driver.add([], 8)  # position 0 would have no row to be read from


def test_an_answer_ends_at_the_models_own_stops(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of text: the token ends the answer and is no part of it."""
    from vllm import SamplingParams

    engine, prompt = driver.engine, prompt_of(9, 2)

    def answer(**params: Any) -> tuple[list[int], str]:
        wishes = SamplingParams(temperature=0, max_tokens=20, detokenize=False, **params)
        (output,) = engine.llm.generate({"prompt_token_ids": prompt}, wishes, use_tqdm=False)
        return list(output.outputs[0].token_ids), output.outputs[0].finish_reason

    whole, _ = answer()
    stop = whole[5]
    config = driver.llm_engine.vllm_config.model_config.hf_config
    monkeypatch.setattr(config, "stop_ids", [stop], raising=False)
    monkeypatch.setattr(engine.scheduler, "_traits", traits_of(config))
    cut, reason = answer(extra_args={"elastic_policy": "none", "elastic_tokens_per_step": 1})
    assert reason == "stop" and stop not in cut and len(cut) < 20
    ignoring, reason = answer(ignore_eos=True)
    assert reason == "length" and stop not in ignoring and len(ignoring) == 20
    engine.scheduler.records.clear()


def test_streamed_deltas_make_the_whole_answer(driver: Driver) -> None:
    prompts = [(prompt_of(3 + 11 * i, i), 5 + 7 * i) for i in range(4)]
    asked = [{"prompt_token_ids": p, "max_tokens": n} for p, n in prompts]
    whole = driver.engine.run(asked)
    names = [driver.add(p, n) for p, n in prompts]
    driver.run()
    for name, result in zip(names, whole, strict=True):
        assert [t for t in driver.tokens[name] if t != EOS] == result["token_ids"]
    assert_nothing_left(driver)


def test_infilling_equals_the_forward(serve: Callable[[str], Served], driver: Driver) -> None:
    """A hole is predicted from the row before it, be it a fixed token, a mask or the prompt."""
    served = serve("dream")
    wanted = [MASK, 12, MASK, MASK, 13, MASK, 14]
    prompt = prompt_of(9, 4)
    options = {"logit_bias": {EOS: -100.0}}
    name = driver.add(prompt, len(wanted), options, policy="none", tokens_per_step=1, canvas=wanted)
    driver.run()
    (record,) = driver.take_records().values()
    canvas = torch.tensor(prompt + wanted)
    for step in record.steps:
        (position,) = step["committed"]
        logits = served.oracle.head(served.oracle.forward(canvas))
        logits[:, [MASK, EOS]] = -torch.inf
        masked = (canvas == MASK).nonzero().flatten()
        best = logits.softmax(-1)[masked - 1].amax(-1).argmax()
        assert position == masked[best], "the surest one"
        canvas[position] = logits[position - 1].argmax()
    assert driver.tokens[name] == canvas[len(prompt) :].tolist()
    assert_nothing_left(driver)


def test_a_tensor_that_dream_does_not_have_is_named(driver: Driver) -> None:
    """Of another Qwen-like model. Those that it has are loaded by the engine above."""
    alien = {"model.layers.0.self_attn.q_norm.weight": torch.ones(32)}
    with pytest.raises(ValueError, match=r"DreamModel has no tensor 'model.layers.0.self_attn.q_n"):
        driver.engine.runner.model.load_weights(alien.items())
