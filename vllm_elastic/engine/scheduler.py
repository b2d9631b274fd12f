# SPDX-License-Identifier: Apache-2.0
"""vLLM's scheduler for canvases: admission by KV blocks, plans within the row budget, commits."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_elastic.config import elastic_config_of
from vllm_elastic.decoding.canvas import NO_POSITIONS, Positions
from vllm_elastic.decoding.overlap import PlansInFlight, next_group_size
from vllm_elastic.decoding.plan import BlockIds, Logprobs, PassPlan, PassResult
from vllm_elastic.decoding.record import DecodingRecord
from vllm_elastic.decoding.request import DenoisingRequest, NotFiniteError
from vllm_elastic.decoding.round_robin import RoundRobin
from vllm_elastic.engine.attachments import ENDED, SPAN, EndedRequest, attach
from vllm_elastic.engine.grammar import AnswerGrammar
from vllm_elastic.engine.reporting import (
    RequestClock,
    ended_request,
    ends_with_end_token,
    logprobs_lists,
    passes_to_show,
    send_passes,
    spans_of,
)
from vllm_elastic.engine.sampling import end_token_ids_of, sampling_of
from vllm_elastic.models.registry import traits_of
from vllm_elastic.runner.limits import limits_of

logger = init_logger("vllm.vllm_elastic.scheduler")


class ElasticScheduler(Scheduler):
    """Owns the canvas of every request and decides what each step computes and commits.

    A request holds the KV blocks of its whole canvas (P + max_tokens) from admission on, so
    running out of blocks never preempts. Each step serves running requests round robin, those
    served longest ago first, up to its ``StepLimits``. A request with more rows than the row budget
    (``max_num_batched_tokens``) runs alone, in row chunks.

    With ``--async-scheduling`` vLLM asks for a step while another one runs
    (``EngineCore.step_with_batch_queue``). It is of other requests (``PlansInFlight``), or empty.
    KV blocks of a request that ends or starts over meanwhile are free at once: whose they are next
    writes them in a later pass, and a device runs passes in order.

    Attributes:
        limits: what the requests of one step may take together.
        records: finished requests' records, kept only with ``record`` in the config.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.elastic_config = elastic_config_of(self.vllm_config)
        self._traits = traits_of(self.vllm_config.model_config.hf_config)
        # Of requests that name no seed: vLLM promises the same answers of an engine of this seed.
        own = self.vllm_config.parallel_config.data_parallel_index
        self._seeds = random.Random(f"{self.vllm_config.model_config.seed} {own}")
        self._denoising: dict[str, DenoisingRequest] = {}  # what runs
        self._round_robin = RoundRobin()
        # --max-num-scheduled-tokens, where there is one, is the smaller of the two row budgets.
        self.limits = replace(limits_of(self.vllm_config), rows=self.max_num_scheduled_tokens)
        self._overlaps = self.vllm_config.max_concurrent_batches > 1
        self._in_flight = PlansInFlight()
        self._clock = RequestClock()
        self.records: dict[str, DecodingRecord] = {}
        self._ended: list[EndedRequest] = []  # since the last statistics
        self._traces = self.vllm_config.observability_config.otlp_traces_endpoint is not None

    # One step: admit, plan, and take the results.

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Plan one step; the plans travel on the output as ``elastic_plans``."""
        self.current_step += 1
        self.kv_cache_manager.new_step_starts()
        if self._pause_state == PauseState.UNPAUSED:
            self._admit()
        plans: list[PassPlan] = []
        if self._pause_state != PauseState.PAUSED_ALL:
            plans = self._plan_step()
        rows = {plan.request_id: plan.num_rows for plan in plans}
        output = SchedulerOutput(
            scheduled_new_reqs=self._with_images(plans),
            scheduled_cached_reqs=CachedRequestData.make_empty(),
            num_scheduled_tokens=rows,
            total_num_scheduled_tokens=sum(rows.values()),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=[],
            preempted_req_ids=self.reset_preempted_req_ids,
        )
        output.elastic_plans = plans  # survives pickling
        self.kv_cache_manager.take_new_block_ids()
        self._update_after_schedule(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Commit what the passes predicted and emit every finished prefix."""
        results: list[PassResult] = getattr(model_runner_output, "pass_results", [])
        failed: list[str] = []
        shown: dict[int, list[Logprobs]] = {}
        watched: list[tuple[int, str, list[dict[str, Any]]]] = []
        plans: list[PassPlan] = scheduler_output.elastic_plans
        served: list[str] = []
        for index, (plan, result) in enumerate(zip(plans, results, strict=True)):
            if not self._in_flight.take(plan):
                continue  # aborted while the pass ran, or its KV blocks were taken away
            request_id = plan.request_id
            denoising = self._denoising[request_id]
            served.append(request_id)
            if result.fault is not None:
                logger.error("%s; request %s is ended with an error", result.fault, request_id)
                failed.append(request_id)
                continue
            try:
                tokens = denoising.finish_pass(result)
            except NotFiniteError as error:
                logger.error("%s; the request is ended with an error", error)
                failed.append(request_id)
                continue
            if denoising.just_committed.size:
                self._clock.committed(request_id)
            model_runner_output.sampled_token_ids[index] = tokens
            if result.logprobs is not None:
                shown[index] = denoising.take_logprobs(len(tokens))
            if denoising.config.watch:
                client = self.requests[request_id].client_index
                watched.append((client, request_id, passes_to_show(denoising)))
        if shown:
            model_runner_output.logprobs = logprobs_lists(shown, len(results))
        self._end_with_error(*failed)
        spans = {}
        if self._traces:
            spans = spans_of(model_runner_output.req_ids, self._denoising, self._clock)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for output in (output for sent in outputs.values() for output in sent.outputs):
            if output.request_id in spans:
                output.kv_transfer_params = attach(
                    output.kv_transfer_params, SPAN, spans[output.request_id]
                )
        for client, request_id, passes in watched:
            send_passes(outputs.setdefault(client, EngineCoreOutputs()), request_id, passes)
        for request_id in served:
            request = self.requests.get(request_id)
            if request is not None:
                # vLLM counts rows as tokens computed; a canvas has no such frontier.
                request.num_computed_tokens = request.num_tokens
        return outputs

    # What a step is made of.

    def _admit(self) -> None:
        """Move waiting requests to running while blocks for their whole canvases are free."""
        unready: list[Request] = []
        adapters = {self._adapter_of(request) for request in self.running} - {0}
        while self.waiting and len(self.running) < self.max_num_active_reqs:
            request = self.waiting.peek_request()
            if not self._has_its_grammar(request) or not self._has_a_slot(request, adapters):
                unready.append(self.waiting.pop_request())
                self.deferred_waiting.add(request)  # vLLM's metrics tell them from the others
                continue
            blocks = self.kv_cache_manager.allocate_slots(
                request,
                request.num_prompt_tokens,
                num_lookahead_tokens=request.max_tokens,
                has_scheduled_reqs=bool(self.running),
            )
            if blocks is None:
                break
            (own_blocks,) = self.kv_cache_manager.get_block_ids(request.request_id)
            block_ids = np.array(own_blocks, dtype=np.int32)
            self.waiting.pop_request()
            self.deferred_waiting.discard(request)
            resumed = request.status == RequestStatus.PREEMPTED
            request.status = RequestStatus.RUNNING
            if request.prefill_stats is not None and not resumed:
                request.prefill_stats.set(
                    num_prompt_tokens=request.num_prompt_tokens,
                    num_local_cached_tokens=0,
                    num_external_cached_tokens=0,
                )
            if self.log_stats:
                request.record_event(EngineCoreEventType.SCHEDULED, time.monotonic())
            self._clock.admitted(request.request_id)
            self.running.append(request)
            if resumed:
                self._denoising[request.request_id].restart(block_ids)
            else:
                try:
                    self._denoising[request.request_id] = self._begin(request, block_ids)
                except ValueError as error:  # admission has refused it, or knows other knobs
                    logger.error("%s; request %s is ended", error, request.request_id)
                    self._end_with_error(request.request_id)
                    continue
            self._round_robin.add(request.request_id)
            adapters |= {self._adapter_of(request)} - {0}
        for request in reversed(unready):
            self.waiting.prepend_request(request)

    def _end_with_error(self, *request_ids: str) -> None:
        """Have vLLM end them with FINISHED_ERROR at its next update, which tells their clients.

        Until then one whose ``_begin`` failed is running without a ``DenoisingRequest``.
        """
        # Of vLLM's lists of requests to end so, this one is a set in every release.
        self.encoder_cache_mismatch_reqs.update(request_ids)

    def _has_its_grammar(self, request: Request) -> bool:
        """Whether nothing is being compiled for it any more; others need not wait for that."""
        wanted = request.structured_output_request
        if wanted is None:
            return True
        grammar = wanted.grammar  # asked once: a moment later it may be there
        if isinstance(grammar, Exception):
            logger.error("request %s: no grammar: %s", request.request_id, grammar)
            self._end_with_error(request.request_id)
            return False
        return grammar is not None

    def _has_a_slot(self, request: Request, in_use: set[int]) -> bool:
        """Whether its adapter is in use or one more may be; others need not wait for that."""
        own = self._adapter_of(request)
        return not own or own in in_use or len(in_use) < self.lora_config.max_loras

    def _begin(self, request: Request, block_ids: BlockIds) -> DenoisingRequest:
        params = request.sampling_params
        assert params is not None and request.prompt_token_ids is not None
        end_token_ids = end_token_ids_of(params)
        config = self.elastic_config.for_request(params.extra_args)
        return DenoisingRequest(
            request.request_id,
            request.prompt_token_ids,
            request.max_tokens,
            config,
            self._traits,
            # The authors' own schedules decode to the end; vLLM still cuts the answer at its end
            # token.
            end_token_ids=frozenset() if config.fixed_steps else frozenset(end_token_ids),
            block_size=self.block_size,
            block_ids=block_ids,
            adapter=request.lora_request,
            stored_inputs=_image_positions(request),
            sampling=sampling_of(
                params,
                config,
                request.num_prompt_tokens,
                self._traits,
                end_token_ids,
                seed=self._seeds.getrandbits(63),
            ),
            grammar=self._grammar_of(request),
        )

    def _grammar_of(self, request: Request) -> AnswerGrammar | None:
        wanted = request.structured_output_request
        if wanted is None:
            return None
        assert wanted.grammar is not None and not isinstance(wanted.grammar, Exception)
        return AnswerGrammar(wanted.grammar, self.vllm_config.model_config.get_vocab_size())

    def _plan_step(self) -> list[PassPlan]:
        free = [
            r.request_id
            for r in self.running
            # One that is about to be ended with an error has no `DenoisingRequest`.
            if r.request_id in self._denoising and r.request_id not in self._in_flight
        ]
        most = None
        if self._overlaps:
            most = next_group_size([self._plan_of(each) for each in free], len(self._in_flight))
        taken = self._round_robin.take(free, self._plan_of, self.limits, most)
        if self.lora_config is not None:  # neighbours with one adapter are multiplied at once
            taken.sort(key=lambda each: self._adapter_of(self.requests[each[0]]))
        plans = [plan for _, plan in taken]
        for plan in plans:
            self._in_flight.add(plan)
        return plans

    @staticmethod
    def _adapter_of(request: Request) -> int:
        """Its number; 0: it has none."""
        return 0 if request.lora_request is None else request.lora_request.lora_int_id

    def _plan_of(self, request_id: str) -> PassPlan:
        return self._denoising[request_id].plan()

    def _with_images(self, plans: list[PassPlan]) -> list[NewRequestData]:
        """The images of those whose KV blocks are fresh: workers keep nothing else of a request."""
        fresh = [plan.request_id for plan in plans if not plan.num_written]
        return [
            NewRequestData.from_request(
                self.requests[request_id], self.kv_cache_manager.get_block_ids(request_id)
            )
            for request_id in fresh
            if self.requests[request_id].mm_features
        ]

    # Where vLLM asks.

    def _preempt_request(
        self, request: Request, timestamp: float, drop_stale_output: bool = False
    ) -> None:
        self._in_flight.drop(request.request_id)
        super()._preempt_request(request, timestamp, drop_stale_output)

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        denoising = self._denoising.pop(request.request_id, None)
        self._round_robin.remove(request.request_id)
        self._in_flight.drop(request.request_id)
        first_commit = self._clock.seconds_to_commit(request.request_id)
        seconds = self._clock.stop(request.request_id)
        end_token = ends_with_end_token(request, self._traits.stop_ids)
        if denoising is not None and seconds is not None:
            denoising.record.seconds = seconds
            if self.elastic_config.record:
                self.records[request.request_id] = denoising.record
            if self.log_stats:
                num_tokens = request.num_output_tokens - end_token
                self._ended.append(
                    ended_request(request, denoising, self.vllm_config, first_commit, num_tokens)
                )
        params, ec_params = super()._free_request(request, delay_free_blocks)
        if end_token:
            params = attach(params, ENDED, True)
        return params, ec_params

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, with the requests that ended since the last ones."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._ended:
            stats.kv_connector_stats = attach(stats.kv_connector_stats, ENDED, self._ended)
            self._ended = []
        return stats


def _image_positions(request: Request) -> Positions:
    """Canvas positions of a request's images, ascending."""
    images = [feature.mm_position for feature in request.mm_features]
    ranges = [np.arange(at.offset, at.offset + at.length, dtype=np.int32) for at in images]
    return np.concatenate([NO_POSITIONS, *ranges])
