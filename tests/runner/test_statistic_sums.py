# SPDX-License-Identifier: Apache-2.0
"""Statistics of several requests in shared tensors, against each request's own by ``naive``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_elastic.attention import naive
from vllm_elastic.decoding.plan import PassPlan, Segment
from vllm_elastic.models import ranks
from vllm_elastic.runner.statistics.sums import StatisticSums

LAYERS = 4
SHAPE: Any = SimpleNamespace(num_layers=LAYERS, hidden_stride=2, num_heads=2)


def make_plan(length: int, start: int = 0, **wanted: Any) -> PassPlan:
    everyone = np.arange(length, dtype=np.int32)
    segments = [Segment(start, everyone)]
    return PassPlan("", "window", 0, segments, np.zeros(length, np.int32), everyone[:2], **wanted)


def flags(length: int, seed: int) -> Any:
    return np.random.default_rng(seed).random(length) < 0.6


def plans() -> list[PassPlan]:
    """Tracked, judged, both or neither; the longest canvas and the largest number differ."""
    return [
        make_plan(5, granularity=3, watched=flags(5, 1), probes=np.array([1, 4], np.int32)),
        make_plan(9, trackable=flags(9, 2), track_num=3),
        make_plan(20),
        make_plan(7, start=2, trackable=flags(7, 3), track_num=1),
        make_plan(16, granularity=4, watched=flags(16, 4), probes=np.array([2], np.int32)),
        make_plan(13, granularity=3, watched=flags(13, 5), trackable=flags(13, 6), track_num=2),
    ]


def filled(seed: int = 0) -> tuple[StatisticSums, dict[int, torch.Tensor]]:
    """Sums, and the mass [layers, T] of each request that they were filled with."""
    generator = torch.Generator().manual_seed(seed)
    asked = plans()
    sums = StatisticSums(asked, SHAPE, torch.device("cpu"))
    masses = {}
    for indices, layers in (([0, 1], range(4)), ([3], range(2, 4)), ([5, 4], range(1, 4, 2))):
        longest = max(len(asked[index].tokens) for index in indices)
        mass = torch.rand(len(layers), len(indices), longest, generator=generator)
        for nth, index in enumerate(indices):
            mass[:, nth, len(asked[index].tokens) :] = 0
            masses[index] = mass[:, nth, : len(asked[index].tokens)].clone()
        sums.add_mass(indices, layers, mass)
    change, before = torch.rand(2, 1, 3, generator=generator)  # one stored layer, three probes
    sums.add_probes(change, before)
    masses[-1] = (change.sqrt() / before.sqrt())[0]
    return sums, masses


def check(sums: StatisticSums, masses: dict[int, torch.Tensor]) -> None:
    for index, (plan, found) in enumerate(zip(plans(), sums.measure(), strict=True)):
        assert ("most_attended" in found) == (plan.trackable is not None)
        assert ("block_mass" in found) == ("block_probes" in found) == bool(plan.granularity)
        if plan.trackable is not None:
            trackable = torch.from_numpy(plan.trackable)
            expected = naive.most_attended(masses[index], trackable, plan.track_num)
            assert found["most_attended"].tolist() == expected.tolist()
        if plan.granularity:
            share = masses[index].sum(dim=0) / masses[index].sum()
            watched = torch.from_numpy(plan.watched)
            mass, probes = naive.attended_blocks(share, watched, plan.granularity)
            np.testing.assert_allclose(found["block_mass"], mass.numpy(), rtol=1e-6)
            assert found["block_probes"].tolist() == probes.tolist()
    drift = {0: masses[-1][:2], 4: masses[-1][2:]}
    measured = {
        i: own["probe_drift"] for i, own in enumerate(sums.measure()) if "probe_drift" in own
    }
    assert measured.keys() == drift.keys()
    for index, expected in drift.items():
        np.testing.assert_allclose(measured[index][:, 2], expected.numpy(), rtol=1e-6)
        assert not measured[index][:, [0, 1, 3]].any(), "layers whose input is not stored"


def test_each_request_has_its_own_numbers() -> None:
    """Another request's length, granularity or number of tracked positions would be used."""
    check(*filled())


def test_a_request_that_is_not_a_number_stays_alone() -> None:
    """One request's NaN would reach those that share its tensors."""
    sums, _ = filled()
    expected = sums.measure()
    sums, _ = filled()
    sums.add_mass([0, 1], range(4), torch.full((4, 2, 9), torch.nan))
    for index in (3, 4, 5):
        for name, array in sums.measure()[index].items():
            np.testing.assert_array_equal(array, expected[index][name])


def test_ranks_send_no_filling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Canvases are filled up to the longest one's length: that would be sent as well."""
    sent = []

    def add_up(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        sent.extend(part.numel() for part in parts)
        return [part * 2 for part in parts]

    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "add_up", add_up)
    sums, masses = filled()
    sums.add_up()
    check(sums, {index: mass * (2 if index >= 0 else 1) for index, mass in masses.items()})
    tracked = 4 * 9 + 2 * 7 + 2 * 13
    judged = 5 + 16 + 13
    assert sum(sent) == tracked + judged + 2 * 3
