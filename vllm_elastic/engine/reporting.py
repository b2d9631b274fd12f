# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells of requests beside their tokens: when they ended and what they cost,
spans, passes to watch, log probabilities."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request, RequestStatus

from vllm_elastic.decoding.plan import Logprobs
from vllm_elastic.decoding.record import BOUNDS
from vllm_elastic.decoding.request import DenoisingRequest
from vllm_elastic.engine.attachments import PASSES, EndedRequest, attach
from vllm_elastic.engine.span import Attributes, span_attributes


class RequestClock:
    """When requests were admitted and first committed a token, until they end."""

    def __init__(self) -> None:
        self._admitted_at: dict[str, float] = {}
        self._first_commit_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._admitted_at)

    def admitted(self, request_id: str) -> None:
        """Note that a request is admitted now; one admitted again keeps its first time."""
        self._admitted_at.setdefault(request_id, time.monotonic())

    def committed(self, request_id: str) -> None:
        self._first_commit_at.setdefault(request_id, time.monotonic())

    def seconds_to_commit(self, request_id: str) -> float | None:
        """Seconds from admission to the first token; None: there is none yet."""
        first = self._first_commit_at.get(request_id)
        return None if first is None else first - self._admitted_at[request_id]

    def stop(self, request_id: str) -> float | None:
        """Seconds since admission; forgets the request. None: it was never admitted."""
        self._first_commit_at.pop(request_id, None)
        admitted_at = self._admitted_at.pop(request_id, None)
        return None if admitted_at is None else time.monotonic() - admitted_at


def ended_request(
    request: Request,
    denoising: DenoisingRequest,
    vllm_config: VllmConfig,
    first_commit_seconds: float | None,
    num_tokens: int,
) -> EndedRequest:
    """What a request cost, for the front end's counters.

    Args:
        denoising: its record has its seconds.
        num_tokens: of the answer, without its end token.
    """
    record = denoising.record
    finished = request.status in (
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
    )
    return EndedRequest(
        model_name=vllm_config.model_config.served_model_name,
        engine=str(vllm_config.parallel_config.data_parallel_index),
        policy=denoising.config.policy,
        denoising_steps=record.denoising_steps,
        row_layers=record.row_layers,
        full_row_layers=record.full_row_layers,
        passes=dict(record.kinds),
        first_commit_seconds=first_commit_seconds,
        seconds_per_token=record.seconds / num_tokens if finished and num_tokens else None,
    )


def ends_with_end_token(request: Request, stop_ids: Collection[int]) -> bool:
    """Whether the model ended the answer with a token that is no part of its text.

    Args:
        stop_ids: that end an answer beside the end token.
    """
    params = request.sampling_params
    if request.status != RequestStatus.FINISHED_STOPPED or params is None:
        return False
    if request.stop_reason in stop_ids:  # a token's id
        return True
    return (
        request.stop_reason is None
        and request.num_output_tokens > 0
        and request.output_token_ids[-1] == params.eos_token_id
    )


def spans_of(
    request_ids: list[str], denoising: dict[str, DenoisingRequest], clock: RequestClock
) -> dict[str, Attributes]:
    """What the spans of these requests would say if they ended now."""
    return {
        request_id: span_attributes(denoising[request_id], clock.seconds_to_commit(request_id))
        for request_id in request_ids
        if request_id in denoising
    }


def passes_to_show(denoising: DenoisingRequest) -> list[dict[str, Any]]:
    """Entries of the record since the last call; the first pass says what canvas it is of."""
    record, config, canvas = denoising.record, denoising.config, denoising.canvas
    passes = record.take_steps()
    if record.passes == len(passes):
        request = {
            "policy": config.policy,
            "layers": denoising.num_layers,
            "canvas": canvas.capacity,
            "prompt_tokens": canvas.prompt_length,
            "knobs": {name: getattr(config, name) for name in BOUNDS},
        }
        passes[0] = {**passes[0], "request": request}
    return passes


def send_passes(sent: EngineCoreOutputs, request_id: str, passes: list[dict[str, Any]]) -> None:
    """Put a request's passes beside its tokens of this step, or alone where it has none."""
    for output in sent.outputs:
        if output.request_id == request_id:
            break
    else:
        output = EngineCoreOutput(request_id=request_id, new_token_ids=[])
        sent.outputs.append(output)
    output.kv_transfer_params = attach(output.kv_transfer_params, PASSES, passes)


def logprobs_lists(shown: dict[int, list[Logprobs]], num_requests: int) -> LogprobsLists:
    """Log probabilities of the tokens shown in a step, in vLLM's form.

    Requests ask for different numbers of alternatives; rows are padded to the widest.

    Args:
        shown: by the request's index in the step.
    """
    counts = [len(shown.get(index, ())) for index in range(num_requests)]
    rows = [row for index in sorted(shown) for row in shown[index]]
    width = max((row.token_ids.shape[1] for row in rows), default=1)
    token_ids = np.zeros((len(rows), width), dtype=np.int32)
    logprobs = np.full((len(rows), width), -np.inf, dtype=np.float32)
    for index, row in enumerate(rows):
        token_ids[index, : row.token_ids.shape[1]] = row.token_ids[0]
        logprobs[index, : row.logprobs.shape[1]] = row.logprobs[0]
    ranks = np.array([row.ranks[0] for row in rows], dtype=np.int32)
    return LogprobsLists(token_ids, logprobs, ranks, [0, *np.cumsum(counts).tolist()])
