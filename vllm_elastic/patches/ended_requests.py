# SPDX-License-Identifier: Apache-2.0
"""What the front end does when requests end: leave the end token out, count the work."""

from __future__ import annotations

import functools
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import IterationStats, SchedulerStats

from vllm_elastic.engine.metrics import count_ended
from vllm_elastic.engine.report import detach

_WRAPPED = "_vllm_elastic_wrapped"
_ENDED = "_vllm_elastic_ended"


def take_reports_of_ended_requests() -> None:
    """Wrap the front end's output processing, once. Other models' outputs carry no report.

    See patches/ended_requests: vLLM counts the end token as part of the answer, and its metrics
    have no room for another scheduler's counters.
    """
    if hasattr(OutputProcessor.process_outputs, _WRAPPED):
        return
    process_outputs = OutputProcessor.process_outputs
    update_scheduler_stats = OutputProcessor.update_scheduler_stats
    new_completion_output = RequestState._new_completion_output

    @functools.wraps(process_outputs)
    def process(
        self: OutputProcessor,
        engine_core_outputs: list[EngineCoreOutput],
        engine_core_timestamp: float | None = None,
        iteration_stats: IterationStats | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for output in engine_core_outputs:
            if output.finish_reason is not None:
                _take_end_token(self, output, iteration_stats)
        return process_outputs(
            self, engine_core_outputs, engine_core_timestamp, iteration_stats, *args, **kwargs
        )

    @functools.wraps(update_scheduler_stats)
    def update(self: OutputProcessor, stats: SchedulerStats | None) -> None:
        if stats is not None:
            stats.kv_connector_stats, ended = detach(stats.kv_connector_stats)
            for request in ended or ():
                count_ended(request)
        update_scheduler_stats(self, stats)

    @functools.wraps(new_completion_output)
    def without_end(
        self: RequestState,
        token_ids: list[int],
        finish_reason: FinishReason | None,
        stop_reason: int | str | None,
    ) -> CompletionOutput:
        output = new_completion_output(self, token_ids, finish_reason, stop_reason)
        # A stop string in what was shown before has the last word; a number is a stop token.
        by_token = finish_reason is not None and not isinstance(stop_reason, str)
        ended = by_token and getattr(self, _ENDED, False)
        # vLLM's server sends no last chunk for an answer without any token.
        if ended and self.detokenizer is not None and self.detokenizer.num_output_tokens() > 1:
            drop_last_token(output)
        return output

    setattr(process, _WRAPPED, True)
    OutputProcessor.process_outputs = process
    OutputProcessor.update_scheduler_stats = update
    RequestState._new_completion_output = without_end


def drop_last_token(output: CompletionOutput) -> None:
    """Take the last token out of an output's ids, log probabilities and their sum."""
    if not output.token_ids:
        return
    token_id = output.token_ids[-1]
    output.token_ids = output.token_ids[:-1]
    if output.logprobs:
        if output.cumulative_logprob is not None:
            output.cumulative_logprob -= output.logprobs[-1][token_id].logprob
        output.logprobs = output.logprobs[:-1]


def _take_end_token(
    processor: OutputProcessor, output: EngineCoreOutput, iteration: IterationStats | None
) -> None:
    output.kv_transfer_params, ended = detach(output.kv_transfer_params)
    state = processor.request_states.get(output.request_id)
    if not ended or state is None:
        return
    setattr(state, _ENDED, True)
    before = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
    if iteration is not None and state.stats is not None and before + len(output.new_token_ids) > 1:
        # vLLM is about to count all new tokens, for its metrics and traces.
        iteration.num_generation_tokens -= 1
        state.stats.num_generation_tokens -= 1
