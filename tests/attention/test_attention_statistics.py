# SPDX-License-Identifier: Apache-2.0
"""Each attention statistic against its slow twin in ``attention/naive.py``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close
from vllm_elastic.attention import attention_statistics as fast
from vllm_elastic.attention import naive

torch.set_num_threads(1)

# layers, rows, query heads, KV heads, head dim, keys
SHAPES = {
    "mha": (3, 5, 4, 4, 8, 33),
    "gqa-4-to-2": (2, 5, 4, 2, 8, 20),
    "gqa-6-to-2": (2, 3, 6, 2, 16, 17),
    "mqa": (2, 4, 4, 1, 8, 12),
    "one-head": (2, 4, 1, 1, 8, 12),
    "one-row": (3, 1, 4, 2, 8, 9),
    "one-key": (2, 3, 4, 2, 8, 1),
    "one-layer": (1, 3, 4, 4, 8, 9),
    "one-of-all": (1, 1, 1, 1, 1, 1),
    "head-128": (1, 2, 2, 2, 128, 40),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
statistics = pytest.mark.parametrize("statistic", ["released", "paper"])


def random_inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    layers, rows, heads, kv_heads, dim, keys = shape
    generator = torch.Generator().manual_seed(sum(shape))
    q = torch.randn(layers, rows, heads, dim, generator=generator)
    k = torch.randn(layers, kv_heads, dim, keys, generator=generator)
    return q.to(dtype), k.to(dtype)


def random_attention(shape: tuple[int, ...], seed: int = 0, sharpness: float = 1.0) -> torch.Tensor:
    """[L, H, R, T], each row sums to 1."""
    layers, rows, heads, _, _, keys = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(layers, heads, rows, keys, generator=generator) * sharpness
    return scores.softmax(dim=-1)


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_attention_scores(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A query head would read another head's keys, or the sum would be taken in bfloat16."""
    q, k = random_inputs(shape, dtype)
    scores = fast.attention_scores(q, k, 0.3)
    assert scores.dtype == torch.float32
    assert_close("scores", scores, naive.attention_scores(q, k, 0.3), 1e-6)


@shapes
def test_attention_scores_of_a_view(shape: tuple[int, ...]) -> None:
    """Keys come as views into the paged cache, queries as a selection of rows."""
    q, k = random_inputs(shape)
    view = k.transpose(-1, -2).contiguous().transpose(-1, -2)
    order = torch.arange(q.shape[1]).flip(0)
    scores = fast.attention_scores(q[:, order], view, 0.3)
    assert_close("scores", scores, naive.attention_scores(q, k, 0.3)[:, :, order], 1e-6)


@shapes
def test_attention_mass(shape: tuple[int, ...]) -> None:
    """Mass would be a mean, or a sum over the wrong axes."""
    attention = random_attention(shape)
    weights = (torch.arange(attention.shape[2]) % 3 != 1).float()
    mass = fast.attention_mass(attention, weights)
    assert_close("mass", mass, naive.attention_mass(attention, weights), 1e-6)
    layers, _, heads = shape[:3]
    total = torch.full((layers,), heads * float(weights.sum()))
    assert_close("total mass", mass.sum(-1), total, 1e-5)


@shapes
@pytest.mark.parametrize("track_num", [1, 2, 5, 64])
def test_most_attended(shape: tuple[int, ...], track_num: int) -> None:
    """A position that may not be tracked, or the wrong one, would be tracked."""
    attention = random_attention(shape)
    mass = naive.attention_mass(attention, torch.ones(attention.shape[2]))
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        trackable = torch.rand(mass.shape[1], generator=generator) < 0.5
        found = fast.most_attended(mass, trackable, track_num)
        assert found.dtype == torch.int64
        assert found.tolist() == naive.most_attended(mass, trackable, track_num).tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_most_attended_with_ties(data: st.DataObject) -> None:
    """Ties would depend on the sort: two runs or two ranks would track different positions."""
    layers, keys = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
    values = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=keys, max_size=keys)
    mass = torch.tensor([data.draw(values) for _ in range(layers)])
    flags = data.draw(st.lists(st.booleans(), min_size=keys, max_size=keys))
    track_num = data.draw(st.integers(1, 6))
    found = fast.most_attended(mass, torch.tensor(flags), track_num)
    expected = naive.most_attended(mass, torch.tensor(flags), track_num)
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("track_num", [1, 3])
def test_most_attended_of_a_long_row_of_ties(track_num: int) -> None:
    """Vectorized reductions take rows in lanes; the first lane need not be the smallest index."""
    found = fast.most_attended(torch.ones(2, 5000), torch.arange(5000) >= 7, track_num)
    assert found.tolist() == [list(range(7, 7 + track_num))] * 2


@pytest.mark.parametrize("track_num", [1, 3])
def test_most_attended_where_all_is_masked(track_num: int) -> None:
    """A masked position would be tracked when nothing else is there."""
    found = fast.most_attended(torch.rand(2, 6), torch.zeros(6, dtype=torch.bool), track_num)
    assert found.tolist() == [[-1] * track_num] * 2


@pytest.mark.parametrize("track_num", [1, 3])
def test_most_attended_takes_positions_without_mass(track_num: int) -> None:
    """Mass that underflowed to 0 would count as 'may not be tracked'."""
    found = fast.most_attended(torch.zeros(1, 4), torch.ones(4, dtype=torch.bool), track_num)
    assert found.tolist() == [list(range(track_num))]


def similarity(old: torch.Tensor, new: torch.Tensor, statistic: str) -> torch.Tensor:
    """By all heads at once."""
    sums = fast.drift_sums(old, new, statistic)
    return fast.similarity_of_sums(sums, statistic, old.shape[1] * old.shape[2])


@shapes
@statistics
def test_drift_similarity(shape: tuple[int, ...], statistic: str) -> None:
    """Drift would be measured across the wrong axis."""
    old = random_attention(shape, seed=1)
    new = old.log() + 0.5 * torch.randn(old.shape, generator=torch.Generator().manual_seed(2))
    new = new.softmax(dim=-1)
    found = similarity(old, new, statistic)
    assert_close(statistic, found, naive.drift_similarity(old, new, statistic), 1e-5)


@shapes
@statistics
def test_drift_similarity_of_sharp_attention(shape: tuple[int, ...], statistic: str) -> None:
    """Where attention is all but zero the norms have to be clamped as in the released code."""
    old, new = random_attention(shape, 1, 60.0), random_attention(shape, 2, 60.0)
    found = similarity(old, new, statistic)
    assert_close(statistic, found, naive.drift_similarity(old, new, statistic), 1e-5)


@pytest.mark.parametrize("num_ranks", [2, 4])
@statistics
def test_drift_similarity_of_heads_on_several_ranks(statistic: str, num_ranks: int) -> None:
    """A rank's heads alone would be judged, or a mean be taken of means of cosines."""
    old, new = random_attention(SHAPES["mha"], 1), random_attention(SHAPES["mha"], 2)
    parts = [
        fast.drift_sums(a, b, statistic)
        for a, b in zip(old.chunk(num_ranks, dim=1), new.chunk(num_ranks, dim=1), strict=True)
    ]
    sums = [torch.stack(ranks).sum(dim=0) for ranks in zip(*parts, strict=True)]
    found = fast.similarity_of_sums(sums, statistic, old.shape[1] * old.shape[2])
    assert_close(statistic, found, naive.drift_similarity(old, new, statistic), 1e-5)


@statistics
def test_no_drift_is_one(statistic: str) -> None:
    """gamma = 1 would fire without drift, or 0.9 would never."""
    attention = random_attention(SHAPES["gqa-4-to-2"])
    found = similarity(attention, attention, statistic)
    assert_close(statistic, found, torch.ones(2), 1e-6)


def test_the_two_statistics_differ() -> None:
    """Both names would compute the same."""
    shape = SHAPES["mha"]
    old, new = random_attention(shape, 1), random_attention(shape, 2)
    released, paper = (similarity(old, new, s) for s in ("released", "paper"))
    assert (released - paper).abs().min() > 0.01


def test_released_statistic_by_hand() -> None:
    """Both twins could share a mistake. Two heads swap their rows (0.8, 0.2) and (0.4, 0.6)."""
    old = torch.tensor([[[[0.8, 0.2]], [[0.4, 0.6]]]])  # [1, 2 heads, 1 row, 2 keys]
    new = old.flip(1)
    across_heads = [2 * 0.8 * 0.4 / (0.64 + 0.16), 2 * 0.2 * 0.6 / (0.04 + 0.36)]
    across_keys = (0.8 * 0.4 + 0.2 * 0.6) / ((0.68 * 0.52) ** 0.5)
    released = similarity(old, new, "released")
    paper = similarity(old, new, "paper")
    assert_close("released", released, torch.tensor([sum(across_heads) / 2]), 1e-6)
    assert_close("paper", paper, torch.tensor([across_keys]), 1e-6)
