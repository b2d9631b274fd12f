# SPDX-License-Identifier: Apache-2.0
"""What the tensor-parallel ranks send each other in a pass: counted, and as the formula has it.

The formula is docs/deploy.md's. Bytes are those of one rank's input.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm_elastic.decoding.measurement import BlockProbe
from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models.rows import bucket

KINDS = ["all_reduce", "all_gather", "all_gatherv", "gather", "reduce_scatter", "reduce_scatterv"]
KINDS += ["broadcast", "send", "recv"]
FLOAT = 4  # bytes
Traffic = Counter[str]
"""``kind`` -> calls, ``kind bytes`` -> bytes."""


def count_collectives(worker: Any) -> None:
    """Runs in a worker: counts from here on, pass by pass."""
    from vllm.distributed import get_tp_group

    passes: list[Traffic] = []
    worker.model_runner.traffic = passes
    communicator = get_tp_group().device_communicator

    def counted(kind: str, send: Any) -> Any:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            passes[-1].update({kind: 1, f"{kind} bytes": tensor.nbytes})
            return send(tensor, *args, **kwargs)

        return call

    for kind in KINDS:
        if hasattr(communicator, kind):
            setattr(communicator, kind, counted(kind, getattr(communicator, kind)))
    run = worker.model_runner.run

    def run_counted(plans: Any) -> Any:
        passes.append(Counter())
        return run(plans)

    worker.model_runner.run = run_counted


def take_collectives(worker: Any) -> list[Traffic]:
    """Runs in a worker: the traffic of each pass since the last call."""
    passes = worker.model_runner.traffic
    taken = list(passes)
    passes.clear()
    return taken


def expected_traffic(
    plans: list[PassPlan], config: Any, num_ranks: int, row_budget: int, hidden_stride: int
) -> Traffic:
    """What a pass over these plans has to send; config: the oracle's ``LLaDAConfig``."""
    traffic: Traffic = Counter()

    def add(kind: str, numbers: int, calls: int = 1) -> None:
        traffic.update({kind: calls, f"{kind} bytes": numbers * FLOAT})

    d, own_d, num_layers = config.d_model, config.d_model // num_ranks, config.n_layers
    joining = Counter({layer: 0 for layer in range(num_layers)})
    for plan in plans:
        for segment in plan.segments:
            joining[segment.join_layer] += len(segment.positions)
    window = sum(len(plan.window) for plan in plans)
    if joining[0]:
        add("all_reduce", bucket(joining[0]) * d)  # the embedding
    rows = 0
    for layer in range(num_layers):
        rows += joining[layer]
        if layer and joining[layer]:
            add("all_gather", joining[layer] * own_d)
        finished = rows if layer < num_layers - 1 else window
        if rows:
            add("all_reduce", 2 * bucket(finished) * d, calls=2 * -(-finished // row_budget))
    tested = sum(plan.tested.size for plan in plans)
    if tested:
        add("all_gather", (num_layers - 1) // hidden_stride * tested * own_d)
    add("all_gather", bucket(window) * config.embedding_size // num_ranks)
    statistics = sum(numbers_reduced(plan, num_layers, hidden_stride) for plan in plans)
    if statistics:
        add("all_reduce", statistics)
    return traffic


def numbers_reduced(plan: PassPlan, num_layers: int, hidden_stride: int) -> int:
    """Numbers that a plan's statistics add up over ranks."""
    length, measure = len(plan.tokens), plan.measure
    if isinstance(measure, BlockProbe):
        return length + 2 * ((num_layers - 1) // hidden_stride) * measure.probes.size
    if measure is None:
        return 0
    numbers = (num_layers - plan.start_layer) * length
    if measure.tested.size:
        layers = num_layers if measure.tested_layers is None else measure.tested_layers
        layers = len(range(0, layers, hidden_stride))
        numbers += layers * (
            3 * plan.tested.size * length if measure.statistic == "released" else 1
        )
    return numbers
