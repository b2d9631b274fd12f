# SPDX-License-Identifier: Apache-2.0
"""Rows and join layers."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm_elastic.decoding.plan import PassKind, PassPlan, segments_by_join_layer

JOIN_LAYERS = st.integers(1, 5).flatmap(
    lambda layers: st.tuples(
        st.just(layers), st.lists(st.integers(0, layers), min_size=1, max_size=20)
    )
)


def plan_of(join_layers: list[int], num_layers: int) -> PassPlan:
    segments = segments_by_join_layer(np.array(join_layers, dtype=np.int16), num_layers)
    return PassPlan(
        request_id="r",
        kind=PassKind.WINDOW,
        denoising_step=0,
        segments=segments,
        tokens=np.zeros(len(join_layers), dtype=np.int32),
        window=np.empty(0, dtype=np.int32),
    )


@given(JOIN_LAYERS)
def test_segments_partition_the_rows_that_take_part(case: tuple[int, list[int]]) -> None:
    """A row would be computed twice, at the wrong layer, or not at all."""
    num_layers, join_layers = case
    plan = plan_of(join_layers, num_layers)
    joins = [segment.join_layer for segment in plan.segments]
    assert joins == sorted({layer for layer in join_layers if layer < num_layers})
    for segment in plan.segments:
        expected = [p for p, layer in enumerate(join_layers) if layer == segment.join_layer]
        assert segment.positions.tolist() == expected
        assert segment.positions.dtype == np.int32


@given(JOIN_LAYERS)
def test_row_layers_add_up(case: tuple[int, list[int]]) -> None:
    """The measure of work that every benchmark reports would be wrong."""
    num_layers, join_layers = case
    plan = plan_of(join_layers, num_layers)
    computed = [sum(join <= layer for join in join_layers) for layer in range(num_layers)]
    assert plan.row_layers(num_layers) == sum(computed)
    assert plan.num_rows == computed[-1]
    if plan.segments:
        assert plan.start_layer == min(join_layers)
