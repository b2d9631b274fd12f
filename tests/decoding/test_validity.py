# SPDX-License-Identifier: Apache-2.0
"""From which layer on each KV block is stale."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_elastic.decoding.validity import BlockValidity

NUM_LAYERS = 5


@st.composite
def invalidations(draw: st.DrawFn) -> tuple[int, int, list[int | list[int]]]:
    """Canvas length, block size, and what is passed to ``invalidate`` one after the other."""
    length = draw(st.integers(1, 40))
    block_size = draw(st.sampled_from([1, 2, 3, 32]))
    layer = st.integers(0, NUM_LAYERS)
    num_blocks = -(-length // block_size)
    each = st.lists(layer, min_size=num_blocks, max_size=num_blocks)
    return length, block_size, draw(st.lists(layer | each, max_size=4))


@given(invalidations())
def test_blocks_only_become_staler_until_validated(
    case: tuple[int, int, list[int | list[int]]],
) -> None:
    """A stale block would be reused, or its rows would join at the wrong layer."""
    length, block_size, calls = case
    validity = BlockValidity(length, block_size, NUM_LAYERS)
    assert validity.join_layers().tolist() == [0] * length  # nothing is stored yet
    validity.validate()
    assert validity.all_valid
    stale_from = [NUM_LAYERS] * -(-length // block_size)
    for call in calls:
        validity.invalidate(call if isinstance(call, int) else np.array(call, dtype=np.int16))
        now = [call] * len(stale_from) if isinstance(call, int) else call
        stale_from = [min(pair) for pair in zip(stale_from, now, strict=True)]
        expected = [stale_from[position // block_size] for position in range(length)]
        assert validity.join_layers().tolist() == expected
        assert validity.all_valid == (min(stale_from) == NUM_LAYERS)
    validity.validate()
    assert validity.all_valid


def test_blocks_are_stale_from_layers_whose_input_is_stored() -> None:
    """Rows would join from hidden states that nobody keeps."""
    validity = BlockValidity(4, 1, NUM_LAYERS, hidden_stride=2)
    validity.validate()
    validity.invalidate(np.array([1, 3, 4, NUM_LAYERS], dtype=np.int16))
    assert validity.join_layers().tolist() == [0, 2, 4, NUM_LAYERS]


def test_join_layers_may_be_changed_by_the_caller() -> None:
    """Planning a pass would mark blocks stale for all passes after it."""
    for block_size in (1, 4):
        validity = BlockValidity(8, block_size, NUM_LAYERS)
        validity.validate()
        validity.join_layers()[:] = 0
        assert validity.all_valid


@pytest.mark.parametrize(("length", "num_blocks"), [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2)])
def test_the_last_block_may_be_partial(length: int, num_blocks: int) -> None:
    """The positions behind the last full block would belong to no block."""
    validity = BlockValidity(length, 32, NUM_LAYERS)
    assert validity.stale_from.shape == (num_blocks,)
    assert validity.join_layers().shape == (length,)
