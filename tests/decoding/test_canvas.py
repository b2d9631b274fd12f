# SPDX-License-Identifier: Apache-2.0
"""The canvas: commits, the leftmost end, and the finished prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.decoding.fake_model import END_TOKENS, MASK, PROMPT_TOKEN, VOCABULARY
from vllm_elastic.decoding.canvas import Canvas

ENDS = frozenset(END_TOKENS)


def canvas_of(prompt_length: int, num_new_tokens: int, ends: frozenset[int] = ENDS) -> Canvas:
    return Canvas([PROMPT_TOKEN] * prompt_length, num_new_tokens, MASK, ends)


def commit(canvas: Canvas, tokens: dict[int, int]) -> None:
    positions = np.array(sorted(tokens), dtype=np.int32)
    canvas.commit(positions, np.array([tokens[p] for p in sorted(tokens)], dtype=np.int32))


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[dict[int, int]]]:
    """Prompt length and every new position's token, in random order and groups."""
    prompt_length = draw(st.integers(0, 4))
    count = draw(st.integers(1, 12))
    order = draw(st.permutations(range(prompt_length, prompt_length + count)))
    tokens = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=count, max_size=count))
    groups: list[dict[int, int]] = []
    for position, token in zip(order, tokens, strict=True):
        if not groups or draw(st.booleans()):
            groups.append({})
        groups[-1][position] = token
    return prompt_length, groups


@given(histories())
def test_canvas_agrees_with_a_list_of_tokens(history: tuple[int, list[dict[int, int]]]) -> None:
    """A token would be lost, shown twice, or shown from behind the end."""
    prompt_length, groups = history
    known: dict[int, int] = {}
    length = prompt_length + sum(map(len, groups))
    canvas = canvas_of(prompt_length, length - prompt_length)
    emitted: list[int] = []
    for group in groups:
        commit(canvas, group)
        known |= group
        ends = [p for p, token in known.items() if token in ENDS]
        end = min(ends) + 1 if ends else length
        prefix = []
        for position in range(prompt_length, end):
            if position not in known:
                break
            prefix.append(known[position])
        emitted += canvas.take_finished()
        assert canvas.end == end
        assert emitted == prefix
        assert canvas.take_finished() == []
        assert canvas.done == (len(prefix) == end - prompt_length)
        assert canvas.masked.tolist() == [
            p >= prompt_length and p not in known for p in range(length)
        ]
        assert canvas.tokens.tolist() == [
            PROMPT_TOKEN if p < prompt_length else known.get(p, MASK) for p in range(length)
        ]
    assert canvas.done


@given(histories(), st.integers(0, 20), st.integers(0, 16), st.none() | st.integers(0, 20))
def test_first_masked_skips_holes(
    history: tuple[int, list[dict[int, int]]], count: int, start: int, stop: int | None
) -> None:
    """A window would hold positions that are committed, dropped, or outside its text block."""
    prompt_length, groups = history
    length = prompt_length + sum(map(len, groups))
    canvas = canvas_of(prompt_length, length - prompt_length)
    for group in groups[: len(groups) // 2]:
        commit(canvas, group)
    bound = canvas.end if stop is None else min(stop, canvas.end)
    expected = [p for p in range(length) if canvas.masked[p] and start <= p < bound][:count]
    found = canvas.first_masked(count, start, stop)
    assert found.tolist() == expected
    assert found.dtype == np.int32


def test_a_position_is_committed_only_once() -> None:
    """A committed token would change after it was streamed."""
    canvas = canvas_of(1, 4)
    commit(canvas, {2: 5})
    with pytest.raises(ValueError, match=r"committed twice: \[2\]"):
        commit(canvas, {2: 6, 3: 6})
    assert canvas.tokens.tolist() == [PROMPT_TOKEN, MASK, 5, MASK, MASK]
    with pytest.raises(ValueError, match="committed twice"):
        commit(canvas, {0: 6})  # the prompt


def test_an_earlier_end_drops_more_and_a_later_one_nothing() -> None:
    """Text behind the end would be decoded, or the end would move back."""
    canvas = canvas_of(2, 6)
    commit(canvas, {6: END_TOKENS[0]})
    assert canvas.end == 7
    commit(canvas, {4: END_TOKENS[1]})
    assert canvas.end == 5
    commit(canvas, {2: 0, 3: 0, 5: END_TOKENS[0]})
    assert canvas.end == 5
    assert canvas.done
    assert canvas.masked[7]
    assert canvas.take_finished() == [0, 0, END_TOKENS[1]]


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    """A chat prompt that holds the end token would get an empty answer."""
    canvas = Canvas([END_TOKENS[0], 5, END_TOKENS[0]], 2, MASK, ENDS)
    assert canvas.end == 5
    commit(canvas, {3: 4, 4: 4})
    assert canvas.take_finished() == [4, 4]


def test_canvas_of_one() -> None:
    """max_tokens=1 would hang or emit nothing."""
    canvas = canvas_of(3, 1)
    assert canvas.first_masked(100).tolist() == [3]
    assert canvas.take_finished() == []
    commit(canvas, {3: END_TOKENS[0]})
    assert canvas.done
    assert canvas.take_finished() == [END_TOKENS[0]]


def test_it_grows_when_all_is_committed() -> None:
    """The model would see masks that are not there yet, or the answer would stop short."""
    canvas = Canvas([1, 2], 7, MASK, grow_by=3)
    assert (canvas.length, canvas.capacity, len(canvas.tokens)) == (5, 9, 5)
    commit(canvas, {3: 50, 4: 51})
    assert (canvas.length, canvas.take_finished()) == (5, []), "a hole is left"
    commit(canvas, {2: 52})
    assert canvas.length == 8 and canvas.take_finished() == [52, 50, 51]
    assert canvas.first_masked(9).tolist() == [5, 6, 7] and not canvas.done
    commit(canvas, {5: 50, 6: 50, 7: 50})
    assert canvas.length == 9, "no more than was asked for"
    commit(canvas, {8: 50})
    assert canvas.done and canvas.length == 9


def test_it_grows_ahead() -> None:
    """Masks would wait for the last commit before them, or for none at all."""
    canvas = Canvas([1, 2], 12, MASK, grow_by=3, grow_ahead=4)
    assert canvas.length == 8, "of the first 3 masks are too few"
    commit(canvas, {3: 50, 4: 51})
    assert canvas.length == 8, "6 from the first masked one on"
    commit(canvas, {2: 52})
    assert canvas.length == 11, "3 of them only"
    commit(canvas, {5: 50, 6: 50, 7: 50, 8: 50, 9: 50, 10: 50})
    assert canvas.length == canvas.capacity == 14


@pytest.mark.parametrize("place", [2, 4])
def test_an_end_stops_growth(place: int) -> None:
    """Also at the last position of what is there."""
    canvas = Canvas([1, 2], 7, MASK, ENDS, grow_by=3)
    commit(canvas, {at: END_TOKENS[0] if at == place else 50 for at in (2, 3, 4)})
    assert canvas.done and canvas.length == 5


def test_infilling_keeps_what_is_fixed() -> None:
    """Fixed tokens are shown in their place, and at once where nothing is missing before them."""
    canvas = Canvas([1, 2], 5, 9, frozenset({3}), answer=[7, 9, 8, 9, 6])
    assert canvas.masked.tolist() == [False, False, False, True, False, True, False]
    assert canvas.take_finished() == [7]
    canvas.commit(np.array([5], dtype=np.int32), np.array([4], dtype=np.int32))
    assert canvas.take_finished() == []
    canvas.commit(np.array([3], dtype=np.int32), np.array([5], dtype=np.int32))
    assert canvas.take_finished() == [5, 8, 4, 6] and canvas.done
