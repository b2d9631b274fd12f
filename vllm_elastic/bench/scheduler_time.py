# SPDX-License-Identifier: Apache-2.0
"""What the scheduler takes of a step, on real requests whose passes are only pretended."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np

from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.decoding.measurement import (
    BlockProbe,
    DriftTest,
    Measured,
    MeasuredDrift,
    MeasuredProbes,
)
from vllm_elastic.decoding.plan import PassPlan, PassResult

_STEPS = 30
"""Denoising steps to a request: enough for a median."""


@dataclass(frozen=True)
class SchedulerSeconds:
    """Host time of a step's scheduling, vLLM's own share with it.

    Attributes:
        planning: before the pass: admission, plans. results: after it: commits.
    """

    planning: float
    results: float

    @property
    def together(self) -> float:
        return self.planning + self.results


def scheduler_seconds(
    engine: BenchEngine, policy: str, batch_size: int, canvas: int
) -> SchedulerSeconds:
    """Medians over the steps of a batch of real requests with this policy.

    What their passes report is made up, so that no model is waited for.

    Args:
        canvas: positions; a part of them is prompt.
    """
    steps = min(_STEPS, canvas // 2)
    special = (engine.mask_token_id, engine.eos_token_id)
    word = next(token_id for token_id in range(3) if token_id not in special)
    requests = [
        {
            "prompt_token_ids": [word] * (canvas - steps),
            "max_tokens": steps,
            "elastic_policy": policy,
            "elastic_tokens_per_step": 1,
        }
        for _ in range(batch_size)
    ]
    scheduler = engine.scheduler
    places, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, batch_size
    try:
        with _pretended(engine, word), _timed(scheduler) as (planning, results):
            engine.run(requests)
    finally:
        scheduler.max_num_active_reqs = places
    return SchedulerSeconds(statistics.median(planning), statistics.median(results))


@contextlib.contextmanager
def _pretended(engine: BenchEngine, word: int) -> Iterator[None]:
    """No pass is run while the context is open; every prediction is ``word``."""
    generator = np.random.default_rng(1)

    def run(plans: list[PassPlan]) -> list[PassResult]:
        return [_result(plan, word, engine.num_layers, generator) for plan in plans]

    with patch.object(engine.runner, "run", run):
        yield


def _result(
    plan: PassPlan, word: int, num_layers: int, generator: np.random.Generator
) -> PassResult:
    """Something that a pass might report: no drift, attention here and there, no end token."""
    count = len(plan.window)
    measure = plan.measure
    measured: Measured | None = None
    if isinstance(measure, DriftTest):
        places = np.flatnonzero(measure.trackable).astype(np.int32)
        size = (num_layers - plan.start_layer, measure.track_num)
        tested = num_layers if measure.tested_layers is None else measure.tested_layers
        measured = MeasuredDrift(
            generator.choice(places, size),
            np.ones(tested, dtype=np.float32) if measure.tested.size else None,
        )
    elif isinstance(measure, BlockProbe):
        length, probes = len(plan.tokens), len(measure.probes)
        drift = (generator.random((probes, num_layers)) / 100).astype(np.float32)
        measured = MeasuredProbes(
            np.full(length, 1 / length, dtype=np.float32),
            drift if probes else None,
        )
    predicted = np.full(count, word, dtype=np.int32)
    return PassResult(predicted, generator.random(count), measured=measured)


@contextlib.contextmanager
def _timed(scheduler: Any) -> Iterator[tuple[list[float], list[float]]]:
    """Seconds of planning and of taking in results, of each step while the context is open."""

    def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds.append(time.perf_counter() - started)
            return result

        return wrapper

    planning: list[float] = []
    results: list[float] = []
    with (
        patch.object(scheduler, "schedule", timed(scheduler.schedule, planning)),
        patch.object(scheduler, "update_from_output", timed(scheduler.update_from_output, results)),
    ):
        yield planning, results
