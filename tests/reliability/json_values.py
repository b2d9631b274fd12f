# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for JSON: odd values, values by a schema, and what is no JSON at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

INTEGERS = st.sampled_from(
    [
        *(0, -1, 1, 2, 3, 7, 512, 513, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1),
        *(2**64, 10**30, True, 2.0),
    ]
) | st.integers(-1000, 1000)
NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, 1e-320, 1e308, -1e308, 0.3, float("nan"), float("inf"), float("-inf")]
) | st.floats(-3, 3)
TEXTS = st.sampled_from(
    [
        *("", " ", "a", "\x00", "\ud800", "\u202e", "\U0001f600" * 9, "x" * 70_000, "<|mdm_mask|>"),
        *("<|endoftext|>", "true", "-1", "{}", "../../etc", "{{ 1/0 }}", "stop", "auto"),
    ]
) | st.text(max_size=12)
ANYTHING = st.recursive(
    st.none() | st.booleans() | INTEGERS | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)
"""Any JSON value, and NaN, infinities and half surrogate pairs."""

RAW_BODIES = st.sampled_from(
    [
        *(b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"\x00" * 64, b"{'a': 1}", b"NaN"),
        *(b"[" * 100_000, b'{"a":' * 3_000 + b"1" + b"}" * 3_000, b'{"max_tokens":1e999}'),
        b'{"prompt":"a","max_tokens":' + b"9" * 5_000 + b"}",
        b'{"prompt":"a","prompt":["b"],"max_tokens":2,"max_tokens":3}',
        '{"prompt":"a","max_tokens":2}'.encode("utf-16"),
        b'{"prompt":"\\ud800","max_tokens":2}',
        b"x" * 1_000_000,
    ]
) | st.binary(max_size=60)
CONTENT_TYPES = st.sampled_from(
    [
        *("application/json", None, "text/plain", "multipart/form-data", ""),
        *("application/json; charset=utf-7", "application/x-www-form-urlencoded", "a/b/c"),
    ]
)


def resolve(schema: Mapping[str, Any], openapi: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference names."""
    while "$ref" in schema:
        schema = openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def values(
    schema: Mapping[str, Any], openapi: Mapping[str, Any], depth: int
) -> SearchStrategy[Any]:
    """Values of a schema's types, at their limits and beyond; types only, no other rule is kept."""
    schema = resolve(schema, openapi)
    if depth == 0:
        return ANYTHING
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    parts = schema.get("anyOf") or schema.get("oneOf")
    if parts:
        return st.one_of([st.deferred(_later(part, openapi, depth - 1)) for part in parts])
    kind = schema.get("type")
    if kind == "array":
        items = st.deferred(_later(schema.get("items", {}), openapi, depth - 1))
        return st.lists(items, max_size=3)
    if kind == "object":
        properties = {
            name: st.deferred(_later(part, openapi, depth - 1))
            for name, part in schema.get("properties", {}).items()
        }
        required = {n: properties[n] for n in schema.get("required", ()) if n in properties}
        optional = {n: s for n, s in properties.items() if n not in required}
        return st.fixed_dictionaries(required, optional=optional) | st.dictionaries(
            TEXTS, ANYTHING, max_size=3
        )
    simple = {"integer": INTEGERS, "number": NUMBERS, "string": TEXTS, "boolean": st.booleans()}
    return st.none() if kind == "null" else simple.get(str(kind), ANYTHING)


def _later(schema: Mapping[str, Any], openapi: Mapping[str, Any], depth: int) -> Any:
    return lambda: values(schema, openapi, depth)
