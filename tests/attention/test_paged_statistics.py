# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels against ``naive``: in its interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder

from tests.closeness import assert_close
from tests.device import DEVICE, ON_CARD
from vllm_elastic.attention.paged_statistics import PAPER, RELEASED

from .paged_pass import PagedPass, Plan, Shape
from .test_key_layout import DTYPES, TILINGS

torch.set_num_threads(1)

SHAPES = {
    "mha": Shape(heads=2, kv_heads=2),
    "gqa": Shape(heads=6, kv_heads=2, layers=2),
    "gqa-7": Shape(heads=7, kv_heads=1, layers=1),
    "odd-heads": Shape(heads=3, kv_heads=3, dim=24, layers=2),
    "narrow-heads": Shape(heads=2, kv_heads=1, dim=8, layers=2),
    "head-128": Shape(heads=2, kv_heads=1, dim=128, layers=1),
    "33-heads": Shape(layers=1, heads=33, kv_heads=33, dim=8, block_size=32),
    "bf16": Shape(dtype=torch.bfloat16),
    "f16": Shape(dtype=torch.float16),
    "stored-every-second": Shape(layers=5, hidden_stride=2, heads=1, kv_heads=1),
    "large-blocks": Shape(block_size=64),
    "odd-blocks": Shape(block_size=24),
    "heads-first": Shape(heads_first=True),
}
QUICK = ("gqa", "head-128", "bf16", "odd-blocks")  # the interpreter takes seconds for each
shapes = pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, shape in SHAPES.items()
    ],
)

ONE_ROW = Plan(length=5, window=1)
ONE_POSITION = Plan(length=1, window=1)
WHOLE_BLOCKS = Plan(length=32, window=4)
LONG = Plan(length=70, window=20)
WIDE = Plan(length=40, window=38)
MASSES = [ONE_ROW, WHOLE_BLOCKS, ONE_POSITION, LONG, WIDE]


def comparing(statistic: int) -> list[Plan]:
    """Plans that test beside one that does not."""
    first, second = list(range(0, 40, 3)), [2, 3, 33, 34]
    return [
        Plan(40, 5, 0, 1, statistic, tested=[0, 2, 7, 8], written=first),
        Plan(33, 6),
        Plan(70, 3, 0, 1, statistic, tested=[6], written=second, stop_stored=2),
        Plan(20, 1, 0, 1, statistic, tested=[0, 1], written=[19]),
    ]


def masses_of(made: PagedPass, parts: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[L, plans, longest T] by layer, and [plans, longest T] summed over layers."""
    statistics, longest = made.statistics(), max(plan.length for plan in made.plans)
    by_layer = torch.zeros(made.shape.layers, len(made.plans), longest, device=DEVICE)
    summed = torch.zeros_like(by_layer[0])
    for first, stop in parts:
        attention = statistics.read(made.reading(first, stop))
        statistics.add_mass(attention, by_layer)
        statistics.add_mass(attention, summed)
    return by_layer.cpu(), summed.cpu()


def check_mass(made: PagedPass, parts: list[tuple[int, int]]) -> None:
    mass, summed = masses_of(made, parts)
    for index, plan in enumerate(made.plans):
        layers, expected = list(made.layers_of(plan)), made.mass(index)
        assert_close(f"plan {index}", mass[layers, index, : plan.length], expected, 1e-5)
        assert_close(f"{index} summed", summed[index, : plan.length], expected.sum(0), 1e-5)
        others = [layer for layer in range(made.shape.layers) if layer not in layers]
        assert not mass[others, index].any()
        assert not mass[:, index, plan.length :].any()
        assert not summed[index, plan.length :].any()


def similarities_of(made: PagedPass, parts: list[tuple[int, int]]) -> torch.Tensor:
    statistics = made.statistics()
    stored = -(-made.shape.layers // made.shape.hidden_stride)
    out = torch.full((len(made.plans), stored), torch.nan, device=DEVICE)
    for first, stop in parts:
        reading = made.reading(first, stop)
        attention = statistics.read(reading)
        for statistic, count in reading.num_sums.items():
            if count:
                sums = statistics.drift_sums(attention, statistic)
                assert sums.isfinite().all(), "a sum was not written"
                statistics.similarities(reading, statistic, sums, made.shape.heads, out)
    return out.cpu()


def check_similarities(made: PagedPass, parts: list[tuple[int, int]]) -> None:
    found = similarities_of(made, parts)
    for index, plan in enumerate(made.plans):
        stride = made.shape.hidden_stride
        tested = [i // stride for i in made.tested_layers(plan, 0, 99)] if plan.tested else []
        if tested:
            assert_close(f"plan {index}", found[index, tested], made.similarities(index), 1e-5)
        others = [i for i in range(found.shape[1]) if i not in tested]
        assert found[index, others].isnan().all()


@shapes
def test_mass(shape: Shape) -> None:
    """Ragged canvases: a neighbour's keys, a free block's NaN or a filling row would be counted."""
    check_mass(PagedPass(shape, MASSES), [(0, shape.layers)])


@pytest.mark.parametrize("kind", TILINGS)
@pytest.mark.parametrize("heads_first", [True, False], ids=["heads-first", "slots-first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mass_of_every_key_layout(kind: str, heads_first: bool, dtype: str) -> None:
    shape = Shape(2, 2, 1, 16, 64, 1, DTYPES[dtype], kind, heads_first)
    check_mass(PagedPass(shape, [ONE_ROW, Plan(length=90, window=3)]), [(0, 2)])


def test_layers_are_each_plan_s_own() -> None:
    """Replays begin at a layer, block probes look at every n-th: others must stay 0."""
    plans = [Plan(20, 2), Plan(33, 2, first_layer=2), Plan(9, 1, 1, 3), Plan(17, 1, 4, 1)]
    made = PagedPass(Shape(layers=5), plans)
    check_mass(made, [(0, 5)])
    check_mass(made, [(0, 2), (2, 4), (4, 5)])


@pytest.mark.parametrize("statistic", [RELEASED, PAPER], ids=["released", "paper"])
@shapes
def test_drift(shape: Shape, statistic: int) -> None:
    """Old keys would be another row's, or norms be taken across the wrong axis."""
    made = PagedPass(shape, comparing(statistic))
    check_similarities(made, [(0, shape.layers)])
    check_mass(made, [(0, shape.layers)])


@pytest.mark.slow
def test_drift_in_parts() -> None:
    made = PagedPass(SHAPES["stored-every-second"], [*comparing(RELEASED), *comparing(PAPER)])
    check_similarities(made, [(0, 5)])
    check_similarities(made, [(0, 1), (1, 2), (2, 4), (4, 5)])


@pytest.mark.slow
def test_more_tested_rows_than_a_program_takes() -> None:
    tested, written = list(range(1, 80)), list(range(5, 85))
    for statistic in (RELEASED, PAPER):
        plan = Plan(90, 70, 0, 1, statistic, tested=tested, written=written)
        made = PagedPass(Shape(layers=1, heads=3, kv_heads=1), [plan])
        check_similarities(made, [(0, 1)])
        check_mass(made, [(0, 1)])


def test_no_change_is_one() -> None:
    """gamma = 1 would fire without drift."""
    for statistic in (RELEASED, PAPER):
        plan = Plan(40, 3, 0, 1, statistic, tested=[1, 2])
        made = PagedPass(Shape(), [plan])
        made.old_queries.copy_(made.queries[:, [made.first_query[0] + 1, made.first_query[0] + 2]])
        found = similarities_of(made, [(0, 2)])
        assert_close("similarity", found, torch.ones_like(found), 1e-6)


@pytest.mark.slow
def test_a_plan_s_numbers_do_not_depend_on_its_neighbours() -> None:
    """Batch invariance, to the last bit: sums would be taken in an order that the batch decides."""
    shape, everything = Shape(layers=2, heads=4, kv_heads=2), [(0, 2)]
    plans = [*comparing(RELEASED)[:2], *comparing(PAPER)[2:], LONG]
    together = PagedPass(shape, plans)
    mass, summed = masses_of(together, everything)
    drift = similarities_of(together, everything)
    in_parts = [(0, 1), (1, 2)]
    for found, expected in zip(masses_of(together, in_parts), (mass, summed), strict=True):
        assert torch.equal(found, expected)
    for index, plan in enumerate(plans):
        alone = together.alone(index)
        own = slice(plan.length)
        own_mass, own_summed = masses_of(alone, everything)
        assert torch.equal(own_mass[:, 0, own], mass[:, index, own])
        assert torch.equal(own_summed[0, own], summed[index, own])
        same = similarities_of(alone, everything)[0]
        assert torch.equal(same.nan_to_num(-1), drift[index].nan_to_num(-1))


@pytest.mark.slow
def test_a_plan_that_is_not_a_number_stays_alone() -> None:
    plans = [*comparing(RELEASED), LONG]
    clean, spoilt = PagedPass(Shape(), plans), PagedPass(Shape(), plans)
    first = spoilt.first_query[1]
    spoilt.queries[:, first : first + spoilt.num_own[1]] = torch.nan
    mass, expected = masses_of(spoilt, [(0, 2)])[0], masses_of(clean, [(0, 2)])[0]
    assert mass[:, 1, : plans[1].length].isnan().all()
    others = [0, 2, 3, 4]
    assert torch.equal(mass[:, others], expected[:, others])
    assert torch.equal(
        similarities_of(spoilt, [(0, 2)]).nan_to_num(-1),
        similarities_of(clean, [(0, 2)]).nan_to_num(-1),
    )


def test_a_plan_without_rows_pays_nothing() -> None:
    made = PagedPass(Shape(), [ONE_ROW, dataclasses.replace(LONG, window=0), WHOLE_BLOCKS])
    assert not masses_of(made, [(0, 2)])[0][:, 1].any()


@pytest.mark.skipif(ON_CARD, reason="counted by Triton's interpreter")
@pytest.mark.parametrize("kind", ["gpu-keys-beside-values", "shuffled"])
def test_keys_are_read_once_and_looked_at_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/design.md says of the bytes that statistics move."""
    plans = [Plan(40, 20), Plan(100, 31, 0, 1, RELEASED, tested=[0, 30], written=[3])]
    shape = Shape(layers=2, heads=3, kv_heads=3, kind=kind, dtype=torch.bfloat16)
    made = PagedPass(shape, plans)
    kernels, reading, cache = made.statistics(), made.reading(0, 2), made.keys.cache
    first = cache.data_ptr()
    last = first + cache.untyped_storage().nbytes()
    read: list[np.ndarray] = []
    load = InterpreterBuilder.create_masked_load

    def counted(self: Any, places: Any, mask: Any, *rest: Any) -> Any:
        addresses = places.data[mask.data]
        read.append(addresses[(addresses >= first) & (addresses < last)])
        return load(self, places, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted)
    attention = kernels.read(reading)
    keys = shape.layers * shape.kv_heads * shape.dim
    assert len(np.unique(np.concatenate(read))) == keys * (40 + 100)
    # Two looks, and one more for the tested rows as they were.
    assert sum(map(len, read)) == keys * (2 * 40 + 3 * 100)
    # Nothing as large as the keys is made: a number for each head and position, or row.
    rows = made.queries.shape[1] + 2
    made_bytes = attention.lse.nbytes + attention.mass.nbytes
    assert made_bytes == 4 * shape.layers * shape.heads * (40 + 100 + rows)

    read.clear()
    kernels.drift_sums(attention, RELEASED)
    assert sum(map(len, read)) == keys * 100
