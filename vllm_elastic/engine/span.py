# SPDX-License-Identifier: Apache-2.0
"""What a request's OpenTelemetry span says of its denoising, beside vLLM's own attributes."""

from __future__ import annotations

from vllm_elastic.decoding.request import DenoisingRequest

_PREFIX = "vllm.elastic."

Attributes = dict[str, str | int | float]


def span_attributes(request: DenoisingRequest, first_commit_seconds: float | None) -> Attributes:
    """The request as it is now; the counts are as in ``DecodingRecord``.

    Args:
        first_commit_seconds: from admission to the first committed token; None before there is one.
    """
    record, config = request.record, request.config
    values: Attributes = {
        "preset": config.preset,
        "policy": config.policy,
        "canvas": request.canvas.capacity,
        "denoising_steps": record.denoising_steps,
        "passes": record.passes,
        **{f"passes.{kind}": count for kind, count in record.kinds.items()},
        "row_layers": record.row_layers,
        "full_row_layers": record.full_row_layers,
        "committed_tokens": record.committed,
    }
    if first_commit_seconds is not None:
        values["first_commit_seconds"] = first_commit_seconds
    return {_PREFIX + name: value for name, value in values.items()}
