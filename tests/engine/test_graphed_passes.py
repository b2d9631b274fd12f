# SPDX-License-Identifier: Apache-2.0
"""Whole passes by one graph against the same passes run eagerly, over poisoned inputs.

Without a GPU graphs are recorded instead of captured, and attention is torch's own
(``plain_attention``): what a tape of it reads of a pass is tensors.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from vllm import envs
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

from tests.device import ON_CARD, SIMULATED
from tests.recorded_graphs import NAN, RecordedGraphs
from vllm_elastic.models.rows import PassRows, Recorder
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.cuda_graphs import CudaGraphs
from vllm_elastic.runner.executor import GraphExecutor, WholePassExecutor
from vllm_elastic.runner.graphed_pass import (
    GraphedPasses,
    _metadata,
    most_requests,
)

from .checked_passes import CheckedExecutor, run_by
from .conftest import Served, poison
from .driver import Driver, prompt_of
from .schedules import Schedule, play, schedules, the_same_always
from .test_graphs import COUNTS, Counted, capturing
from .test_oracle import CONFIGS, compare, request
from .test_transfers import Operators
from .whole_passes import attention, uncaptured

pytestmark = pytest.mark.engine

NUMBERS = (
    "tokens",
    "positions",
    "slots",
    "window",
    "lengths",
    "starts",
    "window_starts",
    "blocks",
)
MOST_REQUESTS = 3
MOST_ROWS = COUNTS[-1]


class CheckedPasses(CheckedExecutor):
    """Graphs of layers and of whole passes. The last layer finishes as many rows as the others, so
    its products have another shape than in the eager pass and may round otherwise."""

    same_shapes = False

    def __init__(self, runner: Any) -> None:
        canvas = runner.model_config.max_model_len
        graphs = CudaGraphs(runner.device) if ON_CARD else RecordedGraphs()
        self._graphs = Counted(graphs)
        layers, self.whole = (
            GraphExecutor(runner.model),
            uncaptured(runner, MOST_ROWS, MOST_REQUESTS),
        )
        builder = runner._attention_group.get_metadata_builder()
        with torch.inference_mode(), capturing(runner.device):
            layers.capture(graphs, COUNTS)
            self.whole.capture(self._graphs, COUNTS, builder, canvas)
        super().__init__(runner, WholePassExecutor(self.whole, layers))

    @property
    def replays(self) -> int:
        """Of whole passes."""
        return self._graphs.replays

    def run(
        self, tested: Callable[[], torch.Tensor], rows: PassRows, recorder: Recorder | None
    ) -> torch.Tensor:
        self._poison()
        before = self.replays
        hidden = super().run(tested, rows, recorder)
        whole = self.replays > before
        self.passes["whole" if whole else "not whole"] += 1
        if whole:
            requests = len(rows.window.calls[0].metadata.seq_lens)
            self.passes["measuring whole"] += recorder is not None
            self.passes["whole of several"] += requests > 1
            assert rows.layers[0] is not None
            assert {each is rows.layers[0] for each in rows.layers} == {True}
        return hidden

    def _poison(self) -> None:
        """What is legal, and no pass's."""
        self.whole._inputs._buffer.zero_()
        for kept in self.whole._queries._kept.values():
            kept.fill_(NAN)


@contextlib.contextmanager
def checked(served: Served) -> Iterator[CheckedPasses]:
    """An engine whose passes are run both ways."""
    runner: Any = served.engine.runner  # type: ignore[attr-defined]
    with attention(runner):
        executor = CheckedPasses(runner)
        with run_by(served, executor):
            yield executor


@pytest.mark.slow
def test_whole_passes_are_the_eager_ones(serve: Callable[[str], Served]) -> None:
    """Among all other kinds of pass, of one request or several."""
    seen: Counter[str] = Counter()

    @the_same_always(10)
    @given(schedule=schedules())
    def check(schedule: Schedule) -> None:
        served = serve(schedule.model)
        driver = Driver(served)
        poison(driver.engine)
        with checked(served) as executor:
            play(driver, schedule)
        seen.update(executor.passes)

    check()
    whole = ("whole", "whole of several", "measuring whole")
    for kind in (*whole, "not whole", "join later", "chunks"):
        assert seen[kind] > 10, seen


@pytest.mark.parametrize("model", ["gqa-tied", pytest.param("dream", marks=pytest.mark.slow)])
def test_against_the_oracle(model: str, serve: Callable[[str], Served]) -> None:
    """One request after the other, each by as many whole passes as it can."""
    served = serve(model)
    cases = [(6, name) for name in CONFIGS]
    poison(served.engine)
    with checked(served) as executor:
        results = [
            served.engine.run([request(*case)])[0]  # type: ignore[attr-defined]
            for case in cases
        ]
    compare(served, cases, results)
    assert executor.passes["whole"] > 30, executor.passes


def test_a_request_that_wishes(serve: Callable[[str], Served]) -> None:
    """Sampled, with log probabilities: that is the head's, which is in no graph."""
    served = serve("gqa-tied")
    driver = Driver(served)
    wishes = {"temperature": 0.7, "seed": 5, "logprobs": 2, "top_p": 0.9}
    answers = []
    for way in (checked, lambda _: attention(driver.engine.runner)):
        with way(served):
            name = driver.add(prompt_of(30, 2), 24, wishes, window=16)
            driver.run()
        answers.append(driver.tokens[name])
    driver.take_records()
    assert answers[0] == answers[1] and len(answers[0]) > 1


def test_who_reads_other_layers_gets_another_kind_of_pass(serve: Callable[[str], Served]) -> None:
    """Its own knob, and a graph keeps the queries that the server's default reads."""
    served = serve("gqa-tied")
    driver = Driver(served)
    knobs: Any = {"policy": "elastic-block", "window": 16, "measure_every": 1, "block_drift": 1.0}
    with checked(served) as executor:
        kept = executor.whole._queries
        kept.read_layers = set(range(4, -1, -2))
        for stride, wanted in ((2, True), (4, True), (1, False)):
            executor.passes.clear()
            driver.add(prompt_of(45, 3), 24, attention_stride=stride, **knobs)
            driver.run()
            assert (executor.passes["measuring whole"] > 0) == wanted, executor.passes
            assert executor.passes["measured"] > 1
    driver.take_records()


BUILDERS = [TritonAttentionMetadataBuilder, FlashAttentionMetadataBuilder]


@pytest.mark.parametrize("kind", BUILDERS)
def test_gpu_backends_read_the_passes_own_tensors(
    kind: Any, serve: Callable[[str], Served]
) -> None:
    """A builder that copied or worked anything out would freeze what a canvas had at the capture.
    vLLM's own, which need no GPU to build."""
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    passes, builder = uncaptured(runner, MOST_ROWS, MOST_REQUESTS), _builder(kind, runner)
    numbers = passes._inputs.of_one_request(16)
    found = _metadata(builder, passes._inputs.common_metadata(numbers, numbers.starts, 200))
    tensors = {
        "seq_lens": numbers.lengths,
        "block_table": numbers.blocks,
        "query_start_loc": numbers.starts,
    }
    for name, own in tensors.items():
        assert getattr(found, name).data_ptr() == own.data_ptr(), name
    own = passes._inputs._buffer
    for tensor in tensors.values():  # aligned as kernels may want it, and where passes are copied
        assert not (tensor.data_ptr() - own.data_ptr()) % 16
        assert tensor.untyped_storage().data_ptr() == own.untyped_storage().data_ptr()
    assert found.query_start_loc.tolist() == [0, 16, 16, 16]
    assert (found.max_query_len, found.max_seq_len, found.causal) == (16, 200, False)
    # FlashAttention 3 takes several too, where there is one: on Hopper.
    several = kind is TritonAttentionMetadataBuilder or get_flash_attn_version() == 3
    seats = runner.vllm_config.scheduler_config.max_num_seqs
    some = min(16, seats) if several else 1
    assert most_requests(builder, runner.vllm_config, builder.kv_cache_spec) == some


def test_flash_attention_3_gets_no_schedule_and_a_bound(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: Any = serve("gqa-tied").engine.runner  # type: ignore[attr-defined]
    passes, builder = (
        uncaptured(runner, MOST_ROWS, MOST_REQUESTS),
        _builder(FlashAttentionMetadataBuilder, runner),
    )
    monkeypatch.setattr(builder, "aot_schedule", True)
    found = _metadata(builder, _common_metadata(passes))
    assert found.scheduler_metadata is None
    attention = runner.vllm_config.attention_config
    assert found.max_num_splits == attention.flash_attn_max_num_splits_for_cuda_graph > 1
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True)
    assert _metadata(builder, _common_metadata(passes)).max_num_splits == 1


def _common_metadata(passes: GraphedPasses) -> CommonAttentionMetadata:
    numbers = passes._inputs.of_one_request(16)
    return passes._inputs.common_metadata(numbers, numbers.starts, 200)


def _builder(kind: Any, runner: Any) -> Any:
    group = runner._attention_group
    with set_current_vllm_config(runner.vllm_config):
        return kind(group.kv_cache_spec, group.layer_names, runner.vllm_config, runner.device)


@pytest.mark.skipif(ON_CARD, reason="torch does not count launches of Triton's kernels")
def test_operators_of_a_whole_pass(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the host does for one, the head and all: with each layer's graphs it is 147 here, of
    five layers (``test_graphs.BUDGET``). So many of any model."""
    served = serve("gqa-tied")
    driver, most = Driver(served), [0]
    with checked(served) as executor:
        runner = driver.engine.runner
        runner._executor = executor.tested
        run = runner.run

        def counted(plans: Any) -> Any:
            before = executor.replays
            with Operators() as seen:
                results = run(plans)
            if executor.replays > before:
                most[0] = max(most[0], seen.counts.total() + executor.replays - before)
            return results

        monkeypatch.setattr(runner, "run", counted)
        for _ in range(2):  # the upload's buffer grows for the first
            most[0] = 0
            driver.add(prompt_of(45, 3), 64, policy="dual-cache", block_length=16)
            driver.run()
    driver.take_records()
    assert 0 < most[0] <= 35, most


# The test tested: what a faulty one would do.


def _leaves_out(name: str) -> Callable[[GraphedPasses], None]:
    def faulty(whole: GraphedPasses) -> None:
        inputs = whole._inputs
        lay_out = inputs.lay_out

        def without(layout: PassLayout, count: int) -> Any:
            buffer = lay_out(layout, count)
            getattr(inputs._numbers(buffer, np.int32, count), name)[:] = 0
            return buffer

        inputs.lay_out = without  # type: ignore[method-assign]

    return faulty


def _another_number_of_rows(whole: GraphedPasses) -> None:
    counts = sorted(whole._graphs)
    whole._graphs = {count: whole._graphs[fewer] for fewer, count in itertools.pairwise(counts)}


FAULTS: dict[str, Callable[[GraphedPasses], None]] = {
    **{f"{name} left out": _leaves_out(name) for name in NUMBERS},
    "nothing copied": lambda whole: setattr(whole._inputs, "take", lambda buffer: None),
    "another number of rows": _another_number_of_rows,
    "queries of another pass": lambda whole: setattr(
        whole._queries, "_kept", {n: kept.clone() for n, kept in whole._queries._kept.items()}
    ),
}


@pytest.mark.skipif(ON_CARD and not SIMULATED, reason="a missing row ends a card's process")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, serve: Callable[[str], Served]) -> None:
    served = serve("gqa-tied")
    driver = Driver(served)
    with checked(served) as executor:
        FAULTS[fault](executor.whole)
        name = driver.add(prompt_of(45, 3), 24, policy="elastic-block", window=16, granularity=8)
        with pytest.raises((AssertionError, IndexError)):
            driver.run()
    driver.llm_engine.abort_request([name])
    driver.step()
    driver.take_records()
