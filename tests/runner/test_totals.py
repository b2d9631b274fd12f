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
from vllm_elastic.decoding.measurement import BlockProbe, DriftTest, Measure, MeasuredProbes
from vllm_elastic.decoding.plan import PassKind, PassPlan, Segment
from vllm_elastic.runner.download import Download
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
    plan = PassPlan("", PassKind.WINDOW, 0, segments, tokens, everyone[:2], measure=measure)
    return SimpleNamespace(plan=plan, measure=measure, tested=plan.tested)


def flags(length: int, seed: int) -> Any:
    return np.random.default_rng(seed).random(length) < 0.6


def probing(length: int, probes: list[int], seed: int) -> Any:
    rows = np.array(probes, dtype=np.int32)
    return own(length, BlockProbe(rows, flags(length, seed)))


def tracking(length: int, track_num: int, seed: int, start: int = 0) -> Any:
    test = DriftTest(NO_POSITIONS, None, flags(length, seed), track_num, "released")
    return own(length, test, start)


def places_of(owners: dict[int, Any], indices: list[int]) -> torch.Tensor:
    return torch.tensor([list(owners).index(index) for index in indices], device=DEVICE)


def blocks(seed: int = 0) -> tuple[BlockTotals, dict[int, Any], dict[int, torch.Tensor]]:
    """Totals of three requests, and the mass [layers, T] that each was given."""
    owners = {0: probing(5, [1, 4], 1), 4: probing(16, [2], 4), 7: probing(13, [], 5)}
    totals, masses = BlockTotals(owners, CACHE, DEVICE), {}
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


def measured(totals: BlockTotals) -> dict[int, MeasuredProbes]:
    """What the host gets of it."""
    download = Download()
    fetched = totals.results(download)
    download.send()
    found = {index: each.get() for index, each in fetched.items()}
    assert all(isinstance(each, MeasuredProbes) for each in found.values())
    return found  # type: ignore[return-value]


def test_each_request_has_its_own_attention() -> None:
    """Another request's canvas would be used, or its attention."""
    totals, _, masses = blocks()
    found = measured(totals)
    assert found.keys() == masses.keys()
    for index, each in found.items():
        share = masses[index].sum(dim=0) / masses[index].sum()
        torch.testing.assert_close(torch.from_numpy(each.attention), share, rtol=1e-6, atol=0)


@pytest.mark.parametrize("length", range(40, 440, 50))
def test_attention_is_the_same_to_the_bit_in_any_batch(length: int) -> None:
    """What fills a canvas up to another one's length would change how a sum is rounded."""
    mass = torch.rand(1, 1, length, generator=torch.Generator().manual_seed(length))
    found = []
    for others in ({}, {1: probing(length + 31, [], 1)}):
        totals = BlockTotals({0: probing(length, [], 0), **others}, CACHE, DEVICE)
        totals.add_mass(torch.tensor([0], device=DEVICE), mass.to(DEVICE))
        rest = torch.arange(1, 1 + len(others), device=DEVICE)
        totals.add_mass(rest, torch.ones(1, len(others), length, device=DEVICE))
        found.append(measured(totals)[0].attention.tolist())
    assert found[0] == found[1]


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
    found = {index: each.probe_drift for index, each in measured(totals).items()}
    assert found[7] is None
    for index, probes in ((0, slice(2)), (4, slice(2, 3))):
        drift = torch.from_numpy(found[index])
        torch.testing.assert_close(drift[:, 2], expected[probes], rtol=1e-6, atol=0)
        assert not drift[:, [0, 1, 3]].any(), "layers whose input is not stored"


def test_a_request_that_is_not_a_number_stays_alone() -> None:
    """One request's NaN would reach those that share its tensors."""
    first = torch.tensor([0], device=DEVICE)
    expected, _, _ = blocks()
    totals, _, _ = blocks()
    totals.add_mass(first, torch.full((4, 1, 5), torch.nan, device=DEVICE))
    for index in (4, 7):
        wanted_attention = measured(expected)[index].attention
        assert (measured(totals)[index].attention == wanted_attention).all()
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
