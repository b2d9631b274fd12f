# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for requests that are wrong, or legal but odd.

Four sources: edits of good requests by the server's OpenAPI description; parameters that mean
something to LLaDA; bodies that are no JSON or no sane JSON; and Schemathesis.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.reliability.exchange import Ask
from tests.reliability.json_values import (
    ANYTHING,
    CONTENT_TYPES,
    INTEGERS,
    NUMBERS,
    RAW_BODIES,
    TEXTS,
    resolve,
    values,
)
from tests.reliability.malformed_images import asks_with_images
from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.policies import POLICIES
from vllm_elastic.presets import PRESETS

CHAT = [{"role": "user", "content": "Sort : 2 1"}]
CANVAS = 6

GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Sort : 2 1", "max_tokens": CANVAS},
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": CANVAS},
    "/v1/chat/completions/batch": {"messages": [CHAT, CHAT], "max_tokens": CANVAS},
    "/v1/responses": {"input": "Sort : 2 1", "max_output_tokens": CANVAS},
    "/v1/messages": {"model": "tiny", "messages": CHAT, "max_tokens": CANVAS},
    "/v1/messages/count_tokens": {"model": "tiny", "messages": CHAT},
    "/v1/systemone": {"state": "2 1", "questions": {"a": {"type": "boolean"}}},
    "/generative_scoring": {"query": "2", "items": ["1"], "label_token_ids": [5, 6]},
    "/tokenize": {"prompt": "Sort : 2 1"},
    "/detokenize": {"tokens": [5, 6]},
    "/invocations": {"prompt": "Sort : 2 1", "max_tokens": CANVAS},
}
"""A small good request of each endpoint that takes JSON, to be spoilt."""

SKIPPED = {
    "/scale_elastic_ep": "an operator's command: starts and ends engines, 500 on a single engine"
}
"""Endpoints of the OpenAPI description that are left alone, and why."""

KNOB_NAMES = [
    *(f"elastic_{knob.name}" for knob in fields(ElasticConfig)),
    *("elastic_gama", "elastic_", "elastic_\ud800", "elastic_" + "x" * 999, "other"),
]
KNOB_VALUES = (
    st.sampled_from([*POLICIES, *PRESETS, "ELASTIC", "paper", "random", "next", "replay"])
    | st.integers(0, 12)
    | st.sampled_from([1024, 1025])  # about max_window
    | st.floats(0, 2)
    | st.lists(st.sampled_from([1, 1, 1, 0, 5, 333, 334, -1, 2**40]), max_size=CANVAS + 1)
    | ANYTHING
)
TOKEN_IDS = st.lists(st.integers(-1, 340) | INTEGERS, max_size=5)

LLADA_PARAMETERS: dict[str, SearchStrategy[Any]] = {
    "vllm_xargs": st.dictionaries(st.sampled_from(KNOB_NAMES) | TEXTS, KNOB_VALUES, max_size=4)
    | ANYTHING,
    "max_tokens": INTEGERS | ANYTHING,
    "min_tokens": INTEGERS,
    "prompt": TOKEN_IDS | st.lists(TOKEN_IDS, max_size=3) | TEXTS,
    "stop_token_ids": TOKEN_IDS | st.just(list(range(334))),
    "allowed_token_ids": TOKEN_IDS | st.sampled_from([[0], [1], [0, 1], [5]]),
    "bad_words": st.lists(TEXTS | st.sampled_from(["2", "1", "ant bee"]), max_size=4),
    "logit_bias": st.dictionaries(
        (st.integers(-1, 340) | INTEGERS).map(str) | TEXTS, NUMBERS | ANYTHING, max_size=5
    ),
    "stop": st.lists(TEXTS, max_size=5) | TEXTS,
    "temperature": NUMBERS,
    "top_p": NUMBERS,
    "min_p": NUMBERS,
    "top_k": INTEGERS,
    "seed": INTEGERS,
    "n": st.sampled_from([0, -1, 1, 2, 5, 10**9]),
    "logprobs": INTEGERS | st.booleans(),
    "top_logprobs": INTEGERS,
    "echo": st.booleans(),
    "stream": st.booleans() | ANYTHING,
    "stream_interval": INTEGERS,
    "ignore_eos": st.booleans(),
    "use_beam_search": st.booleans(),
    "presence_penalty": NUMBERS,
    "repetition_penalty": NUMBERS,
    "truncate_prompt_tokens": INTEGERS,
    "prompt_logprobs": INTEGERS,
    "response_format": st.sampled_from([{"type": "json_object"}, {"type": "text"}, {}, []]),
    "structured_outputs": st.sampled_from([{"regex": "("}, {"choice": ["a"]}, {}, [], ["a"]]),
    "prompt_embeds": TEXTS,
    "priority": INTEGERS,
    "request_id": TEXTS,
}
"""What decides on a canvas, its constraints and its randomness, wrong in the ways that matter."""


def malformed_asks(openapi: Mapping[str, Any], images: bool = False) -> SearchStrategy[Ask]:
    """Requests for a server with this OpenAPI description; half with images, if it takes them.

    Raises:
        ValueError: the server has an endpoint that is neither in ``GOOD`` nor in ``SKIPPED``.
    """
    paths = dict(_json_endpoints(openapi))
    unknown = sorted(set(paths) - set(GOOD) - set(SKIPPED))
    if unknown:
        raise ValueError(f"no good request to spoil for {', '.join(unknown)}: see malformed.GOOD")
    ours = [
        st.builds(_edited, st.just(path), _edits(GOOD[path], paths[path], openapi))
        for path in paths
        if path in GOOD
    ]
    generators = ["/v1/completions", "/v1/chat/completions", "/invocations"]
    for_llada = st.builds(
        _edited,
        st.sampled_from(generators),
        st.lists(
            st.sampled_from(sorted(LLADA_PARAMETERS)).flatmap(
                lambda name: st.tuples(st.just((name,)), LLADA_PARAMETERS[name])
            ),
            min_size=1,
            max_size=4,
        ),
    )
    json_or_not = st.just("application/json") | CONTENT_TYPES
    raw = st.builds(Ask, st.sampled_from(sorted(GOOD)), RAW_BODIES, json_or_not)
    others = st.builds(
        Ask,
        st.sampled_from(
            [
                *("/v1/models", "/health", "/v1/responses/none", "/v1/responses/%00?stream=1"),
                *("/nothing", "/v1/models/../x", "/v1/completions", "/%ff", "/version?a=%ZZ"),
            ]
        ),
    )
    # Schemathesis takes a tenth of a second to draw one; hence its small share.
    shares = [
        *[_by_schemathesis(openapi)] * 2,
        *[raw] * 2,
        others,
        *[st.one_of(ours)] * 6,
        *[for_llada] * 8,
        *[asks_with_images()] * (19 if images else 0),
    ]
    return st.sampled_from(range(len(shares))).flatmap(lambda number: shares[number])


def _json_endpoints(openapi: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Paths that take a POST, and the schema of what they take (empty where there is none)."""
    for path, operations in openapi["paths"].items():
        if "post" in operations and "{" not in path:
            content = operations["post"].get("requestBody", {}).get("content", {})
            if content or path in GOOD or path in SKIPPED:
                yield path, content.get("application/json", {}).get("schema", {})


def _edits(
    body: Mapping[str, Any], schema: Mapping[str, Any], openapi: Mapping[str, Any]
) -> SearchStrategy[list[tuple[tuple[Any, ...], Any]]]:
    """One to three edits: a place in the body, and what is put there (``...``: taken out)."""
    resolved = resolve(schema, openapi)
    properties: dict[str, Any] = dict(resolved.get("properties", {}))
    for part in resolved.get("anyOf", ()):
        properties |= resolve(part, openapi).get("properties", {})
    names = st.sampled_from(sorted(properties) or ["prompt", "messages", "model"])
    by_schema = names.flatmap(
        lambda name: st.tuples(
            st.just((name,)), values(properties.get(name, {}), openapi, depth=3) | ANYTHING
        )
    )
    inside = st.tuples(st.sampled_from(list(_places(body))), ANYTHING | st.just(...))
    return st.lists(by_schema | inside, min_size=1, max_size=3)


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every part of a JSON value is."""
    if place:
        yield place
    if isinstance(value, dict | list):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(part, (*place, key))


def _edited(path: str, edits: list[tuple[tuple[Any, ...], Any]]) -> Ask:
    body: Any = copy.deepcopy(GOOD[path])
    for place, value in edits:
        at = body
        # An earlier edit may have taken the place away.
        with contextlib.suppress(KeyError, IndexError, TypeError):
            for key in place[:-1]:
                at = at[key]
            if value is ...:
                del at[place[-1]]
            else:
                at[place[-1]] = value
    return Ask(path, body)


def _by_schemathesis(openapi: Mapping[str, Any]) -> SearchStrategy[Ask]:
    """Its idea of requests that follow the description, and of such that do not."""
    import schemathesis
    from schemathesis.generation import GenerationMode

    schema = schemathesis.openapi.from_dict(dict(openapi))

    def ask(case: Any) -> Ask:
        body = case.body
        if not isinstance(body, bytes):
            try:
                json.dumps(body)
            except (TypeError, ValueError):
                body = b""  # Schemathesis's way to say that there is none
        return Ask(case.formatted_path, body, case.media_type or "application/json")

    operations = [
        schema[path]["POST"].as_strategy(generation_mode=mode).map(ask)
        for path, _ in _json_endpoints(openapi)
        if path not in SKIPPED
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    ]
    return st.one_of(operations)
