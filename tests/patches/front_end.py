# SPDX-License-Identifier: Apache-2.0
"""A request as vLLM's front end keeps it, without an engine behind it."""

from __future__ import annotations

from typing import Any

REQUEST_ID = "0-1"
"""Inside, of the request "0"."""


def add_request(
    processor: Any, external_req_id: str = "0", request_id: str | None = None, **params: Any
) -> None:
    """Give an ``OutputProcessor`` a request of two tokens, with these sampling parameters.

    Args:
        request_id: inside; None: as ``REQUEST_ID`` is made.
    """
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    request = EngineCoreRequest(
        request_id=request_id or f"{external_req_id}-1",
        external_req_id=external_req_id,
        prompt_token_ids=[1, 2],
        mm_features=None,
        sampling_params=SamplingParams(**{"detokenize": False, **params}),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    processor.add_request(request, None)
