# SPDX-License-Identifier: Apache-2.0
"""Answers that follow a grammar: against the oracle with an automaton of its own, and as JSON."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from vllm_elastic.reference import LLaDA
from vllm_elastic.reference.llada import HEAD

from .agreement import agrees
from .asynchronous import on_cpus
from .conftest import EOS, MASK, Served, make_engine, random_config
from .driver import Driver, assert_nothing_left, prompt_of
from .test_oracle import ask_oracle

pytestmark = pytest.mark.engine

NUMBERS = r"-?[1-9][0-9]{0,5}(,[1-9][0-9]{0,5}){0,3}"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "sizes": {"type": "array", "items": {"enum": [1, 22, 333]}, "maxItems": 3},
        "kind": {"enum": ["cat", "cow"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}


def numbers(answer: list[int]) -> set[int]:
    """``NUMBERS`` by hand: the bytes, or the end, that may follow an answer so far."""
    if EOS in answer:
        return set()
    text = bytes(answer).decode()
    parts = text.removeprefix("-").split(",")
    digits = set(b"123456789") | (set(b"0") if parts[-1] else set())
    allowed = digits if len(parts[-1]) < 6 else set()
    if text == "":
        allowed = allowed | set(b"-")
    if parts[-1]:
        allowed = allowed | {EOS} | (set(b",") if len(parts) < 4 else set())
    return allowed


def save_byte_tokenizer(folder: Path) -> None:
    """A token for each byte, its id the byte; the rest are special."""
    names = dict(zip(_bytes_as_characters(), range(256), strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=names, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([f"<{token_id}>" for token_id in range(256, MASK + 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"<{EOS}>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def _bytes_as_characters() -> list[str]:
    """How byte-level tokenizers write the bytes 0 to 255."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def spelling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A random model of bytes that is sure of much, and likes digits."""
    folder = tmp_path_factory.mktemp("spelling")
    torch.manual_seed(0)
    config = random_config(d_model=128, n_heads=4, n_kv_heads=2, n_layers=3, weight_tying=False)
    oracle = LLaDA.random(config, seed=5)
    oracle.weights[HEAD][: MASK + 1] *= 1.5
    oracle.weights[HEAD][ord("1") : ord("6")] *= 3
    oracle.save_pretrained(folder)
    save_byte_tokenizer(folder)
    yield Served("spelling", folder, oracle, make_engine(folder))


def grammar(**wanted: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**wanted)}


CONFIGS: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "elastic": {"policy": "elastic", "gamma": 0.8, "threshold": 0.3},
    "block": {"policy": "elastic-block", "granularity": 8, "commit": "frontier", "threshold": 0.2},
    "dual-cache": {"policy": "dual-cache", "block_length": 8, "threshold": 0.1},
    "top-k": {"policy": "interval", "interval": 3, "tokens_per_step": 4},
    "steady": {"policy": "none", "commit": "steady", "steady_threshold": 0.05, "window": 5},
    "grown": {"policy": "elastic-block", "grow_by": 5, "threshold": 0.2},
}


def test_equals_oracle(spelling: Served) -> None:
    """Several tokens a step, all of them allowed, and beside requests without a grammar."""
    driver = Driver(spelling)
    cases = list(itertools.product(range(6), CONFIGS))
    names = [
        driver.add(prompt_of(9 + 7 * index, index), 24, grammar(regex=NUMBERS), **CONFIGS[name])
        for index, name in cases
    ]
    free = driver.add(prompt_of(9, 0), 24, **CONFIGS["none"])
    driver.run()
    records = driver.take_records()
    equal, several = [], 0
    for name, (index, config) in zip(names, cases, strict=True):
        options = {**CONFIGS[config], "grammar": numbers}
        expected = ask_oracle(spelling, prompt_of(9 + 7 * index, index), 24, options)
        tokens = [token for token in driver.tokens[name] if token != EOS]
        result = {
            "token_ids": tokens,
            "steps": records[name].steps,
            "passes": records[name].passes,
            "row_layers": records[name].row_layers,
            "full_row_layers": records[name].full_row_layers,
            "denoising_steps": records[name].denoising_steps,
        }
        equal.append(agrees(result, expected, (index, config)))
        several += any(len(entry["committed"]) > 1 for entry in records[name].steps)
    assert equal.count(False) <= 1
    assert several > len(cases) / 2
    assert driver.tokens[free] != driver.tokens[names[0]]


def test_json_follows_its_schema(spelling: Served) -> None:
    """Of a model that knows nothing of JSON; an answer is the same alone and in a batch."""
    driver = Driver(spelling)
    rules = [{"commit": "threshold", "threshold": 0.2}, {"policy": "elastic-block"}, {}]

    def add(index: int) -> str:
        wish = {"temperature": 1.0, "seed": index, "logprobs": 1 if index % 2 else None}
        wish["logit_bias"] = dict.fromkeys(b" \t\r\n", -100.0)  # JSON may be spaced at will
        knobs = rules[index % len(rules)]
        return driver.add(
            prompt_of(12 + index, index), 160, {**grammar(json=SCHEMA), **wish}, **knobs
        )

    names = [add(index) for index in range(9)]
    driver.run()
    for name in names:
        assert driver.finished[name] == "stop", bytes(driver.tokens[name])
        answer = bytes(driver.tokens[name]).decode()
        jsonschema.validate(json.loads(answer), SCHEMA)
    alone = add(4)
    driver.run()
    assert driver.tokens[alone] == driver.tokens[names[4]]
    assert_nothing_left(driver)


def test_canvas_that_is_too_short_is_cut(spelling: Served) -> None:
    """As vLLM cuts an answer at max_tokens: what there is is the beginning of one."""
    driver = Driver(spelling)
    name = driver.add(prompt_of(12, 1), 7, grammar(json=SCHEMA))
    driver.run()
    assert driver.finished[name] == "length"
    assert bytes(driver.tokens[name]).decode().startswith("{")
    assert_nothing_left(driver)


def test_blocks_taken_away_in_the_middle(spelling: Served) -> None:
    """The grammar stands where the answer does when the canvas starts over."""
    driver = Driver(spelling)
    names = [driver.add(prompt_of(12, 1), 40, grammar(regex=NUMBERS)) for _ in range(2)]
    for _ in range(3):
        driver.step()
    assert driver.engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    driver.run()
    texts = [bytes(t for t in driver.tokens[name] if t != EOS).decode() for name in names]
    assert texts[0] == texts[1] and re.fullmatch(NUMBERS, texts[0])
    assert_nothing_left(driver)


def test_one_bad_grammar_costs_nobody_else(
    spelling: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not compiled, one that comes to a dead end, and one that takes its time."""
    driver = Driver(spelling)
    manager = driver.engine.scheduler.structured_output_manager
    create, release = manager._create_grammar, threading.Event()

    def slow_or_not(request: Any) -> Any:
        if request.structured_output_request.params.regex == "slow":
            release.wait(60)
        if request.structured_output_request.params.regex == "none":
            raise ValueError("none for you")
        return create(request)

    monkeypatch.setattr(manager, "_create_grammar", slow_or_not)
    none = driver.add(prompt_of(5, 2), 9, grammar(regex="none"))
    # No token of the model has these bytes.
    banned = driver.add(prompt_of(5, 3), 9, {**grammar(regex="7+"), "bad_words": ["7"]})
    good = driver.add(prompt_of(5, 4), 9, grammar(choice=["7"]))
    slow = driver.add(prompt_of(5, 1), 9, grammar(regex="slow"))
    free = driver.add(prompt_of(5, 5), 9)
    while len(driver.finished) < 4:
        driver.step()
    assert (driver.finished[none], driver.finished[banned]) == ("error", "error")
    assert driver.finished[good] == "stop" and driver.tokens[good] == [ord("7")]
    assert free in driver.finished and slow not in driver.finished
    release.set()
    driver.run()
    assert bytes(driver.tokens[slow]) == b"slow"
    assert_nothing_left(driver)


def test_a_grammar_that_fails_while_it_is_asked_for(spelling: Served) -> None:
    """A request without a grammar would be admitted, and end the engine."""
    answers = iter([None, ValueError("just now")])

    class Compiling:
        @property
        def grammar(self) -> Any:
            return next(answers)

    request = SimpleNamespace(structured_output_request=Compiling(), request_id="0")
    assert not spelling.engine.scheduler._has_its_grammar(request)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"canvas": [MASK, 5, MASK]}, "elastic_canvas"),
        ({"steps": 3}, "elastic_steps"),
        ({"alg": "entropy", "steps": 3}, "elastic_"),
    ],
)
def test_what_does_not_go_together(knobs: dict[str, Any], named: str, spelling: Served) -> None:
    from vllm.exceptions import VLLMValidationError

    driver = Driver(spelling)
    with pytest.raises(VLLMValidationError, match=f"structured_outputs and '{named}"):
        driver.add(prompt_of(5, 1), 3, grammar(regex="7"), block_length=3, **knobs)
    with pytest.raises(VLLMValidationError, match="structured_outputs and ignore_eos"):
        driver.add(prompt_of(5, 1), 3, {**grammar(regex="7"), "ignore_eos": True})
    assert_nothing_left(driver)


def test_with_async_scheduling(spelling: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an answer depends on changes, and a bad grammar alone is told too."""
    cases = [(grammar(regex=NUMBERS), {}), (grammar(choice=["cow", "cat"]), {"commit": "steady"})]

    def answers(served: Served) -> list[list[int]]:
        driver = Driver(served)
        names = [
            driver.add(
                prompt_of(9 + index, index), 24, *cases[index % 2][:1], **cases[index % 2][1]
            )
            for index in range(8)
        ]
        driver.run()
        assert all(driver.finished[name] in ("stop", "length") for name in names)
        dead_end = driver.add(prompt_of(5, 3), 9, {**grammar(regex="7+"), "bad_words": ["7"]})
        driver.run()
        assert driver.finished[dead_end] == "error"
        manager = driver.engine.scheduler.structured_output_manager
        with monkeypatch.context() as patch:
            patch.setattr(manager, "_create_grammar", lambda request: 1 / 0)
            not_compiled = driver.add(prompt_of(5, 3), 9, grammar(regex="7+"))
            driver.run()
        assert driver.finished[not_compiled] == "error"
        assert_nothing_left(driver)
        return [driver.tokens[name] for name in names]

    with on_cpus():
        engine = make_engine(spelling.directory, async_scheduling=True)
    assert answers(replace(spelling, engine=engine)) == answers(spelling)
