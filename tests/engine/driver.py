# SPDX-License-Identifier: Apache-2.0
"""Drives an engine in this process step by step, as a streaming front end would."""

from __future__ import annotations

from typing import Any

import torch

from .conftest import EOS, Served


def prompt_of(size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 280, (size,), generator=generator).tolist()


class Driver:
    """Adds, steps and aborts by hand, and collects what a streaming client would see."""

    def __init__(self, served: Served) -> None:
        engine: Any = served.engine
        self.engine, self.llm_engine = engine, engine.llm.llm_engine
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, str | None] = {}
        self.count = 0

    def add(
        self,
        prompt: list[int],
        max_tokens: int,
        sampling: dict[str, Any] | None = None,
        priority: int = 0,
        **knobs: Any,
    ) -> str:
        """Queue a request; ``sampling`` are vLLM's parameters, ``knobs`` ours without prefix."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        name = f"driven{id(self)}x{self.count}"
        self.count += 1
        self.tokens[name] = []
        options = {"temperature": 0, "stop_token_ids": [EOS], **(sampling or {})}
        params = SamplingParams(
            max_tokens=max_tokens,
            detokenize=False,
            extra_args={f"elastic_{k}": v for k, v in knobs.items()},
            output_kind=RequestOutputKind.DELTA,
            **options,
        )
        self.llm_engine.add_request(name, {"prompt_token_ids": prompt}, params, priority=priority)
        return name

    def step(self) -> None:
        for output in self.llm_engine.step():
            self.tokens[output.request_id] += list(output.outputs[0].token_ids)
            if output.finished:
                self.finished[output.request_id] = output.outputs[0].finish_reason

    def drain(self) -> None:
        """A pass of a request that was aborted meanwhile may be in flight at the end."""
        while self.llm_engine.engine_core.engine_core.batch_queue:
            self.step()

    def run(self) -> None:
        while self.llm_engine.has_unfinished_requests():
            self.step()

    def canvases(self) -> dict[str, Any]:
        """What the scheduler keeps of each request it has admitted, by the name given here."""
        # vLLM appends a suffix of its own to the ids that requests carry inside.
        denoising = self.engine.scheduler._denoising
        return {inner.split("-")[0]: each for inner, each in denoising.items()}

    def take_records(self) -> dict[str, Any]:
        """The records of requests that ended since the last call, by the name given here."""
        records = self.engine.scheduler.records
        taken = {inner.split("-")[0]: record for inner, record in records.items()}
        records.clear()
        return taken


def assert_nothing_left(driver: Driver) -> None:
    driver.drain()
    driver.step()  # the step after the last tells the worker who finished
    scheduler = driver.engine.scheduler
    assert scheduler.kv_cache_manager.usage == 0
    assert not scheduler.requests and not scheduler.running and not scheduler.waiting
    assert not scheduler._denoising and not len(scheduler._clock)
    assert not len(scheduler._round_robin)
    assert not len(scheduler._in_flight)
    scheduler.records.clear()
