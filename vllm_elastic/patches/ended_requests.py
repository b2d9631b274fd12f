# SPDX-License-Identifier: Apache-2.0
"""What the front end does when requests end: leave the end token out, count tokens and work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.outputs import CompletionOutput
from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import IterationStats, RequestStateStats, SchedulerStats

from vllm_elastic.engine.attachments import ENDED, detach
from vllm_elastic.engine.metrics import count_ended
from vllm_elastic.patches.wrapping import wrap_once

_END_TOKEN = "_vllm_elastic_end_token"


def account_for_ended_requests() -> None:
    """Wrap the front end's statistics and completions, once. Other models report no end.

    See patches/ended_requests: vLLM counts the end token as part of the answer, and its metrics
    have no room for another scheduler's counters.
    """
    wrap_once(OutputProcessor, "update_scheduler_stats", _update)
    wrap_once(OutputProcessor, "_update_stats_from_finished", _count_answer)
    wrap_once(RequestState, "_new_completion_output", _without_end)


def _update(
    update_scheduler_stats: Callable[..., None],
    self: OutputProcessor,
    stats: SchedulerStats | None,
) -> None:
    if stats is not None:
        stats.kv_connector_stats, ended = detach(stats.kv_connector_stats, ENDED)
        for request in ended or ():
            count_ended(request)
    update_scheduler_stats(self, stats)


def _count_answer(
    update_stats_from_finished: Callable[..., None],
    self: OutputProcessor,
    state: RequestState,
    finish_reason: FinishReason | None,
    iteration: IterationStats | None,
) -> None:
    # vLLM has counted what a stop string cut off since.
    if iteration is not None and state.stats is not None and state.detokenizer is not None:
        counted, left = state.stats.num_generation_tokens, state.detokenizer.num_output_tokens()
        # An end token that is left out was not counted.
        _count_fewer(max(counted - left, 0), state.stats, iteration)
    update_stats_from_finished(self, state, finish_reason, iteration)


def _without_end(
    new_completion_output: Callable[..., CompletionOutput],
    self: RequestState,
    token_ids: list[int],
    finish_reason: FinishReason | None,
    stop_reason: int | str | None,
) -> CompletionOutput:
    output = new_completion_output(self, token_ids, finish_reason, stop_reason)
    # A stop string in what was shown before has the last word; a number is a stop token.
    by_token = finish_reason is not None and not isinstance(stop_reason, str)
    ended = by_token and getattr(self, _END_TOKEN, False)
    # vLLM's server sends no last chunk for an answer without any token.
    if ended and self.detokenizer is not None and self.detokenizer.num_output_tokens() > 1:
        drop_last_token(output)
    return output


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


def take_end_token(
    state: RequestState, _: Any, output: EngineCoreOutput, iteration: IterationStats | None
) -> None:
    """Note that the output's last token is an end token, and keep it from vLLM's counts.

    vLLM is about to count all new tokens, for its metrics and traces. With
    ``include_stop_str_in_output`` the end token is part of the answer.
    """
    if getattr(state.detokenizer, "include_stop_str_in_output", False):
        return
    setattr(state, _END_TOKEN, True)
    before = 0 if state.detokenizer is None else state.detokenizer.num_output_tokens()
    if iteration is not None and state.stats is not None and before + len(output.new_token_ids) > 1:
        _count_fewer(1, state.stats, iteration)


def _count_fewer(tokens: int, *stats: RequestStateStats | IterationStats) -> None:
    for each in stats:
        each.num_generation_tokens -= tokens
