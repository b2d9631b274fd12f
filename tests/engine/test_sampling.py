# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters through the engine: alone and in a mixed batch, with and without replays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from .conftest import EOS, MASK, Served, make_engine
from .driver import prompt_of

pytestmark = pytest.mark.engine


def generate(served: Served, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    params = [
        SamplingParams(detokenize=False, **{"stop_token_ids": [EOS], **options})
        for _, options in requests
    ]
    outputs = served.engine.llm.generate(prompts, params, use_tqdm=False)  # type: ignore[attr-defined]
    served.engine.scheduler.records.clear()  # type: ignore[attr-defined]
    return outputs


def tokens(output: Any) -> list[int]:
    return list(output.outputs[0].token_ids)


@pytest.fixture
def served(serve: Callable[[str], Served]) -> Served:
    return serve("gqa-tied")


@pytest.mark.slow
def test_sampled_answer_is_the_same_alone_and_in_a_batch(served: Served) -> None:
    """Random numbers depend on seed, position and step, not on the batch or on replays."""
    requests = [
        (
            prompt_of(5 + 7 * i, i),
            {
                "max_tokens": 9 + 5 * (i % 4),
                "temperature": (0.0, 0.7, 1.3)[i % 3],
                "seed": i,
                "top_p": (1.0, 0.8)[i % 2],
                "extra_args": {"elastic_gamma": (0.0, 0.9, 1.1)[i % 3]},
            },
        )
        for i in range(16)
    ]
    together = [tokens(output) for output in generate(served, requests)]
    backwards = [tokens(output) for output in generate(served, requests[::-1])][::-1]
    alone = [tokens(generate(served, [request])[0]) for request in requests]
    assert together == backwards == alone
    reseeded = generate(served, [(p, {**o, "seed": o["seed"] + 1}) for p, o in requests])
    changed = [a != tokens(b) for a, b in zip(together, reseeded, strict=True)]
    assert [c for i, c in enumerate(changed) if i % 3 == 0] == [False] * 6, "greedy took a seed"
    assert sum(changed) >= 8


def test_without_seed_answers_differ(served: Served) -> None:
    request = (prompt_of(8, 3), {"max_tokens": 24, "temperature": 1.5})
    assert len({tuple(tokens(o)) for o in generate(served, [request] * 4)}) == 4


def test_the_engines_seed_makes_runs_repeat(served: Served) -> None:
    """As stock vLLM promises offline; within a run no two requests share a seed."""
    request = (prompt_of(8, 3), {"max_tokens": 24, "temperature": 1.5})
    greedy = (prompt_of(9, 3), {"max_tokens": 8, "temperature": 0.0})

    def run(seed: int) -> list[list[int]]:
        engine = make_engine(served.directory, seed=seed)
        other = replace(served, engine=engine)
        found = [*generate(other, [request, greedy, request]), *generate(other, [request])]
        return [tokens(output) for output in found]

    first, again, other = run(7), run(7), run(8)
    assert first == again
    assert first[1] == other[1] and first != other
    assert len({tuple(answer) for answer in (*first[:1], *first[2:])}) == 3


def test_ignore_eos_is_answered_with_text(serve: Callable[[str], Served]) -> None:
    """A benchmark that asks for 24 tokens of text would count 24 of which most are padding."""
    served = serve("eager")
    prompts = [prompt_of(6 + i, i) for i in range(4)]
    asked = {"max_tokens": 24, "temperature": 0.0, "stop_token_ids": None}
    plain = generate(served, [(prompt, {**asked, "ignore_eos": False}) for prompt in prompts])
    assert any(EOS in tokens(output) for output in plain), "a model that likes to end"
    for output in generate(served, [(prompt, {**asked, "ignore_eos": True}) for prompt in prompts]):
        assert len(tokens(output)) == 24 and EOS not in tokens(output)
    stopped = {**asked, "ignore_eos": True, "stop_token_ids": [EOS]}
    outputs = generate(served, [(prompt, stopped) for prompt in prompts])
    assert any(len(tokens(output)) < 24 for output in outputs), "asked for by its number"


def test_copies_differ(served: Served) -> None:
    """n: every copy has a seed of its own."""
    options = {"max_tokens": 16, "temperature": 1.5, "seed": 7, "n": 3}
    (output,) = generate(served, [(prompt_of(8, 3), options)])
    assert len({tuple(copy.token_ids) for copy in output.outputs}) == 3


def test_constraints_hold(served: Served) -> None:
    allowed = list(range(40, 60))
    banned = {"logit_bias": {t: -1e4 for t in range(100)}}
    requests = [
        (prompt_of(6, 1), {"max_tokens": 30, "temperature": 0.0, "allowed_token_ids": allowed}),
        (prompt_of(6, 2), {"max_tokens": 30, "temperature": 1.0, **banned}),
        (
            prompt_of(6, 3),
            # an answer that would end at once, were it not for min_tokens
            {"max_tokens": 20, "temperature": 0.0, "min_tokens": 7, "logit_bias": {EOS: 100.0}},
        ),
    ]
    first, second, third = (tokens(output) for output in generate(served, requests))
    assert set(first) <= set(allowed)
    assert min(second) >= 100
    assert third.index(EOS) == 7 and len(third) == 8


@pytest.mark.parametrize(
    ("policy", "model"), [("none", "gqa-tied"), ("elastic", "gqa-tied"), ("none", "dream")]
)
def test_logprobs_are_those_of_the_commit(
    policy: str, model: str, serve: Callable[[str], Served]
) -> None:
    """Against the oracle's forward on the canvas as it was when the token was committed."""
    served = serve(model)
    prompts = [prompt_of(12 + i, i) for i in range(4)]
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=10,
            logprobs=i,
            detokenize=False,
            stop_token_ids=[EOS],
            extra_args={"elastic_policy": policy, "elastic_gamma": 1.1},
        )
        for i in range(4)
    ]
    engine: Any = served.engine
    outputs = engine.llm.generate(
        [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
    )
    records = engine.scheduler.records
    for count, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        answer = tokens(output)
        (record,) = (r for k, r in records.items() if k.startswith(f"{output.request_id}-"))
        canvas = np.array(prompt + [MASK] * 10)
        for step in record.steps:
            committed = step["committed"]
            shown = [p for p in committed if p - len(prompt) < len(answer)]
            if policy == "none":
                hidden = served.oracle.forward(torch.from_numpy(canvas))
                shift = served.oracle.config.logits_shift
                logits = served.oracle.head(hidden[[p - shift for p in shown]]).float()
                logits[:, MASK] = float("-inf")
                wanted = logits[:, : served.oracle.config.vocab_size].log_softmax(-1)
            for row, position in enumerate(shown):
                token = answer[position - len(prompt)]
                reported = output.outputs[0].logprobs[position - len(prompt)]
                assert token in reported and len(reported) in (count, count + 1)
                if policy == "none":
                    for other, entry in reported.items():
                        assert entry.logprob == pytest.approx(float(wanted[row, other]), abs=1e-4)
                canvas[position] = token
        assert len(output.outputs[0].logprobs) == len(answer)
    records.clear()


def test_refused_in_python_too(served: Served) -> None:
    from vllm.exceptions import VLLMValidationError

    for options in (
        {"presence_penalty": 0.5},
        {"prompt_logprobs": 1},
        {"logprob_token_ids": [4]},
        {"extra_args": {"elastic_gamma": 7}},
        {"max_tokens": 300},
    ):
        name = next(iter(options))
        named = "elastic_gamma" if name == "extra_args" else name
        with pytest.raises(VLLMValidationError, match=named):
            generate(served, [(prompt_of(4, 1), {"temperature": 0, "max_tokens": 4, **options})])
    with pytest.raises(VLLMValidationError, match="mask token"):
        generate(served, [([3, MASK], {"temperature": 0, "max_tokens": 4})])


def test_infilling_keeps_both_ends(served: Served) -> None:
    """Masks between fixed tokens are found in place, with no end token ahead of a fixed one."""
    wanted = [11, 12, MASK, MASK, MASK, 13, MASK, 14, MASK, MASK]
    options = {
        "max_tokens": len(wanted),
        "temperature": 0.0,
        "logprobs": 1,
        "logit_bias": {EOS: 50.0},
        "extra_args": {"elastic_canvas": wanted, "elastic_gamma": 0.9},
    }
    (output,) = generate(served, [(prompt_of(9, 4), options)])
    found = tokens(output)
    assert [t for t, w in zip(found, wanted, strict=False) if w != MASK] == [11, 12, 13, 14]
    assert MASK not in found and found.index(EOS) == 8 and len(found) == 9
    logprobs = output.outputs[0].logprobs
    assert [logprobs[i][found[i]].logprob for i in (0, 1, 5, 7)] == [0.0] * 4
    assert all(logprobs[i][found[i]].logprob < 0 for i in (2, 3, 4))


def test_infilling_is_checked(served: Served) -> None:
    from vllm.exceptions import VLLMValidationError

    for canvas, message in (
        ([MASK] * 3, "send max_tokens=3"),
        ([5] * 4, "no mask token"),
        ([MASK, MASK, 5, 100_000], "vocabulary ends at"),
    ):
        options = {"max_tokens": 4, "extra_args": {"elastic_canvas": canvas}}
        with pytest.raises(VLLMValidationError, match=message):
            generate(served, [(prompt_of(4, 1), {"temperature": 0, **options})])


def test_random_remasking_takes_the_seed(served: Served) -> None:
    """Greedy tokens, random order of commits: the seed still counts, a negative one too."""

    def answer(seed: int) -> list[int]:
        knobs = {"elastic_steps": 8, "elastic_block_length": 24, "elastic_remasking": "random"}
        options = {"max_tokens": 24, "temperature": 0.0, "seed": seed, "extra_args": knobs}
        return tokens(generate(served, [(prompt_of(9, 5), options)])[0])

    assert answer(3) == answer(3)
    assert len({tuple(answer(seed)) for seed in (-7, 3, 4, 5)}) > 1
