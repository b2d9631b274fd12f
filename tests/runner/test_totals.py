# SPDX-License-Identifier: Apache-2.0
"""Statistics of several requests in shared tensors, against each request's own by ``naive``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.device import DEVICE
from vllm_elastic.attention import naive
from vllm_elastic.decoding.canvas import NO_POSITIONS
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, Measure
from vllm_elastic.decoding.plan import PassPlan, Segment
from vllm_elastic.runner.statistics.blocks import BlockTotals
from vllm_elastic.runner.statistics.drift import DriftTotals
from vllm_elastic.runner.upload import Upload

LAYERS = 4
CACHE: Any = SimpleNamespace(num_layers=LAYERS, hidden_stride=2, num_heads=2)


def own(length: int, measure: Measure, start: int = 0) -> Any:
    """One plan's rows, as far as the totals look at them."""
    everyone = np.arange(length, dtype=np.int32)
    segments = [Segment(start, everyone)]
    tokens = np.zeros(length, np.int32)
    plan = PassPlan("", "window", 0, segments, tokens, everyone[:2], measure=measure)
    return SimpleNamespace(plan=plan, measure=measure, tested=plan.tested)


def flags(length: int, seed: int) -> Any:
    return np.random.default_rng(seed).random(length) < 0.6


def probing(length: int, block_size: int, probes: list[int], seed: int) -> Any:
    watched, rows = flags(length, seed), np.array(probes, dtype=np.int32)
    return own(length, BlockProbe(rows, watched, block_size))


def tracking(length: int, track_num: int, seed: int, start: int = 0) -> Any:
    test = DriftTest(NO_POSITIONS, None, flags(length, seed), track_num, "released")
    return own(length, test, start)


def places_of(owners: dict[int, Any], indices: list[int]) -> torch.Tensor:
    return torch.tensor([list(owners).index(index) for index in indices], device=DEVICE)


def blocks(seed: int = 0) -> tuple[BlockTotals, dict[int, Any], dict[int, torch.Tensor]]:
    """Totals of three requests, and the mass [layers, T] that each was given."""
    owners = {0: probing(5, 3, [1, 4], 1), 4: probing(16, 4, [2], 4), 7: probing(13, 3, [], 5)}
    upload, masses = Upload(DEVICE), {}
    totals = BlockTotals(owners, CACHE, upload)
    upload.send()
    generator = torch.Generator().manual_seed(seed)
    for indices, layers in (([0], 4), ([7, 4], 2)):
        longest = max(len(owners[index].plan.tokens) for index in indices)
        mass = torch.rand(layers, len(indices), longest, generator=generator)
        for nth, index in enumerate(indices):
            length = len(owners[index].plan.tokens)
            mass[:, nth, length:] = 0
            masses[index] = mass[:, nth, :length].clone()
        totals.add_mass(places_of(owners, indices), mass.to(DEVICE))
    return totals, owners, masses


def drift(seed: int = 0) -> tuple[DriftTotals, dict[int, Any], dict[int, torch.Tensor]]:
    """The same of requests that track."""
    owners = {1: tracking(9, 3, 2), 3: tracking(7, 1, 3, start=2), 5: tracking(13, 2, 6)}
    upload, masses = Upload(DEVICE), {}
    totals = DriftTotals(owners, CACHE, upload)
    upload.send()
    generator = torch.Generator().manual_seed(seed)
    for indices, layers in (([1, 5], range(4)), ([3], range(2, 4))):
        longest = max(len(owners[index].plan.tokens) for index in indices)
        mass = torch.rand(len(layers), len(indices), longest, generator=generator)
        for nth, index in enumerate(indices):
            length = len(owners[index].plan.tokens)
            mass[:, nth, length:] = 0
            masses[index] = mass[:, nth, :length].clone()
        totals.add_mass(places_of(owners, indices), layers, mass.to(DEVICE))
    return totals, owners, masses


def check_blocks(
    found: dict[int, Any], owners: dict[int, Any], masses: dict[int, torch.Tensor]
) -> None:
    assert found.keys() == masses.keys()
    for index, (mass, best) in found.items():
        share = masses[index].sum(dim=0) / masses[index].sum()
        measure = owners[index].measure
        watched = torch.from_numpy(measure.watched)
        expected, positions = naive.attended_blocks(share, watched, measure.block_size)
        torch.testing.assert_close(mass.cpu(), expected, rtol=1e-6, atol=0)
        assert best.tolist() == positions.tolist()


def test_each_request_has_its_own_blocks() -> None:
    """Another request's length, block size or watched positions would be used."""
    totals, owners, masses = blocks()
    check_blocks(totals.blocks(), owners, masses)


def test_each_request_has_its_own_tracked_positions() -> None:
    totals, owners, masses = drift()
    found = totals.most_attended()
    assert found.keys() == masses.keys()
    for index, best in found.items():
        measure = owners[index].measure
        trackable = torch.from_numpy(measure.trackable)
        expected = naive.most_attended(masses[index], trackable, measure.track_num)
        assert best.tolist() == expected.tolist()


def test_each_request_has_its_own_probes() -> None:
    """Two probes of the first request, one of the second, none of the third."""
    totals, _, _ = blocks()
    change, before = torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(1))
    totals.add_probes(change.to(DEVICE), before.to(DEVICE))
    expected = (change.sqrt() / before.sqrt())[0]
    found = {index: part.cpu() for index, part in totals.probe_drift().items()}
    assert {index: len(part) for index, part in found.items()} == {0: 2, 4: 1}
    torch.testing.assert_close(found[0][:, 2], expected[:2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[4][:, 2], expected[2:], rtol=1e-6, atol=0)
    assert not found[0][:, [0, 1, 3]].any(), "layers whose input is not stored"


def test_a_request_that_is_not_a_number_stays_alone() -> None:
    """One request's NaN would reach those that share its tensors."""
    first = torch.tensor([0], device=DEVICE)
    expected, _, _ = blocks()
    totals, _, _ = blocks()
    totals.add_mass(first, torch.full((4, 1, 5), torch.nan, device=DEVICE))
    for index in (4, 7):
        for got, wanted in zip(totals.blocks()[index], expected.blocks()[index], strict=True):
            assert torch.equal(got, wanted)
    expected_drift, _, _ = drift()
    totals_drift, _, _ = drift()
    totals_drift.add_mass(first, range(4), torch.full((4, 1, 9), torch.nan, device=DEVICE))
    for index in (3, 5):
        wanted = expected_drift.most_attended()[index]
        assert torch.equal(totals_drift.most_attended()[index], wanted)


@pytest.mark.parametrize("filled", [blocks, drift])
def test_ranks_send_no_filling(filled: Any) -> None:
    """Canvases are filled up to the longest one's length: that would be sent as well."""
    totals, owners, _ = filled()
    layers = {index: LAYERS - o.plan.start_layer for index, o in owners.items()}
    each = layers if filled is drift else dict.fromkeys(owners, 1)
    wanted = sum(each[index] * len(o.plan.tokens) for index, o in owners.items())
    assert sum(part.numel() for part in totals.parts()) == wanted
    # What comes back has to be written where it was taken from.
    before = [part.clone() for part in totals.parts()]
    for part in totals.parts():
        part.mul_(2)
    for part, old in zip(totals.parts(), before, strict=True):
        assert torch.equal(part, old * 2)
