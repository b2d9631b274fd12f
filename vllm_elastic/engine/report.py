# SPDX-License-Identifier: Apache-2.0
"""What the engine core tells the front end beside the tokens, and in which of vLLM's fields.

A message between the two has two free-form fields, both meant for KV connectors, which are refused
for a LLaDA: ``EngineCoreOutput.kv_transfer_params``, sent when an answer ends by itself, says
whether its last token is an end token; ``SchedulerStats.kv_connector_stats``, sent after every step
unless statistics are off, lists the requests that ended, in whatever way. The front end takes both
out before anyone else looks.
"""

from __future__ import annotations

from typing import Any, TypedDict

KEY = "vllm_elastic"
"""Ours in either field."""

PASSES = "vllm_elastic_passes"
"""Ours in ``kv_transfer_params`` after every pass of a request with ``watch``: what it did."""

SPAN = "vllm_elastic_span"
"""Ours in ``kv_transfer_params`` beside every token, where vLLM traces: attributes of the span."""


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


def attach(field: dict[str, Any] | None, value: Any, key: str = KEY) -> dict[str, Any]:
    """The field with our value in it."""
    return {**(field or {}), key: value}


def detach(field: dict[str, Any] | None, key: str = KEY) -> tuple[dict[str, Any] | None, Any]:
    """The field as vLLM would have sent it, and our value; None where there is none."""
    if not field or key not in field:
        return field, None
    return {name: value for name, value in field.items() if name != key} or None, field[key]
