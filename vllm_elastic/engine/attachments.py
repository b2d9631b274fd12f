# SPDX-License-Identifier: Apache-2.0
"""What the engine core tells the front end beside the tokens, and in which of vLLM's fields.

A message between the two has two free-form fields, both meant for KV connectors, which are refused
for a LLaDA: ``EngineCoreOutput.kv_transfer_params``, beside a request's tokens, and
``SchedulerStats.kv_connector_stats``, sent after every step unless statistics are off. What is ours
in them has a key of its own for each kind. The front end takes it out before anyone else looks.
"""

from __future__ import annotations

from typing import Any, TypedDict

ENDED = "vllm_elastic_ended"
"""Beside tokens: True where the last one is an end token. In statistics: ``EndedRequest`` of those
admitted that ended since the last ones, in whatever way."""

PASSES = "vllm_elastic_passes"
"""Beside tokens, or without any, after every pass of a request with ``watch``: what it did."""

SPAN = "vllm_elastic_span"
"""Beside tokens, where vLLM traces: attributes of the span as it would be now."""


class EndedRequest(TypedDict):
    """What one request cost; the counts are as in ``DecodingRecord``.

    Attributes:
        passes: number by kind.
        first_commit_seconds: from admission to the first committed token; None without one.
        seconds_per_token: from admission to the end, by tokens of the answer without its end token;
            None for an answer that has none, or that did not end by itself.
    """

    model_name: str
    engine: str
    policy: str
    denoising_steps: int
    row_layers: int
    full_row_layers: int
    passes: dict[str, int]
    first_commit_seconds: float | None
    seconds_per_token: float | None


def attach(field: dict[str, Any] | None, key: str, value: Any) -> dict[str, Any]:
    """The field with our value in it."""
    return {**(field or {}), key: value}


def detach(field: dict[str, Any] | None, key: str) -> tuple[dict[str, Any] | None, Any]:
    """The field as vLLM would have sent it, and our value; None where there is none."""
    if not field or key not in field:
        return field, None
    return {name: value for name, value in field.items() if name != key} or None, field[key]
