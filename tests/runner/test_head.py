# SPDX-License-Identifier: Apache-2.0
"""Candidates of many window rows, some logits at a time: the same as all at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.device import DEVICE
from vllm_elastic.decoding.plan import Logprobs, PassKind, PassPlan
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.decoding.traits import DecodingTraits
from vllm_elastic.runner import head as module
from vllm_elastic.runner.allowed_tokens import AllowedTokens
from vllm_elastic.runner.head import Head
from vllm_elastic.runner.upload import Upload

VOCABULARY, MASK, NEVER = 23, 22, 5
TRAITS = DecodingTraits(1, VOCABULARY, MASK, never_chosen=(MASK, NEVER))
WISHES = [
    None,
    Sampling(temperature=0.7, top_p=0.8, seed=3),
    Sampling(num_logprobs=2, banned_token_ids=(1, 2, 3)),
    Sampling(temperature=1.3, seed=9, num_logprobs=1, entropies=True),
    Sampling(temperature=0.9, top_p=0.9, seed=4, alg="entropy"),
    Sampling(alg="topk_margin", banned_token_ids=(1, 2, 3)),
]


ROWS = (4, 9, 5, 7, 4, 2)
FILLING = 3


def plan(first: int, count: int, sampling: Sampling | None) -> PassPlan:
    window = np.arange(first, first + count, dtype=np.int32)
    return PassPlan("", PassKind.WINDOW, 2, [], np.zeros(99, np.int32), window, sampling=sampling)


def predicted(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch, device: torch.device = DEVICE
) -> tuple[Any, Head, list[int]]:
    """Candidates of 31 rows, filled up to 34, and how many rows each call of the head had.

    Args:
        device: what the head takes the upload's for.
    """
    monkeypatch.setattr(module.ranks, "reports", lambda: True)
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", rows_at_once * VOCABULARY)
    plans = [plan(10 + i, n, w) for i, (n, w) in enumerate(zip(ROWS, WISHES, strict=True))]
    upload = Upload(DEVICE)
    upload.device = device
    head = Head(plans, TRAITS, upload)
    upload.device = DEVICE
    upload.send()
    calls: list[int] = []

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(len(hidden))
        return hidden.clone()

    logits = torch.randn(sum(ROWS), VOCABULARY, generator=torch.Generator().manual_seed(4))
    logits[:, [MASK, NEVER]] = 50.0  # what may not be chosen is what the model would choose
    logits = torch.cat([logits, torch.full((FILLING, VOCABULARY), torch.nan)])
    model = SimpleNamespace(compute_logits=compute_logits)
    return head.predict(model, logits.to(DEVICE)), head, calls


def of_host(parts: tuple[torch.Tensor, ...]) -> Logprobs:
    return Logprobs(*(part.cpu().numpy() for part in parts))


@pytest.mark.parametrize("rows_at_once", [1, 4, 7, 24])
def test_some_rows_at_a_time(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request cut in two would lose its positions, its random numbers or its constraints; and
    a pass with wide windows would hold all logits at once."""
    whole, _, calls = predicted(34, monkeypatch)
    assert calls == [34], "the head's product has as many rows as the pass's others"
    assert len(whole.token_ids) == 31 and not whole.probabilities.isnan().any()
    parts, head, calls = predicted(rows_at_once, monkeypatch)
    assert max(calls) == rows_at_once and 31 <= sum(calls) <= 34
    assert torch.equal(parts.token_ids, whole.token_ids)
    torch.testing.assert_close(parts.probabilities, whole.probabilities)
    torch.testing.assert_close(parts.entropies, whole.entropies)
    assert whole.entropies.nonzero().flatten().tolist() == list(range(18, 25))
    assert (whole.probabilities[25:29] < 0).all(), "Dream's confidence by entropy"
    assert parts.logprobs.keys() == whole.logprobs.keys() == {2, 3}
    for index in parts.logprobs:
        found, wanted = of_host(parts.logprobs[index]), of_host(whole.logprobs[index])
        assert found.token_ids.tolist() == wanted.token_ids.tolist()
        assert found.ranks.tolist() == wanted.ranks.tolist()
        np.testing.assert_allclose(found.logprobs, wanted.logprobs)
        assert len(found.ranks) == len(range(31)[head.slices[index]])
    assert not set(whole.token_ids.tolist()) & {MASK, NEVER}


def test_one_kernel_draws_for_all_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where each request for itself would be fifty launches; here in the interpreter."""
    pytest.importorskip("triton")
    from vllm_elastic.runner import sampling_kernel

    launches = []
    draw = sampling_kernel.sample_by_kernel

    def counted(*args: Any) -> None:
        launches.append(args)
        draw(*args)

    monkeypatch.setattr(sampling_kernel, "sample_by_kernel", counted)
    monkeypatch.setattr(module, "sampled", None)
    monkeypatch.setattr(module, "as_dream", None)
    by_kernel, *_ = predicted(34, monkeypatch, torch.device("cuda"))
    assert len(launches) == 1
    monkeypatch.undo()
    by_torch, *_ = predicted(34, monkeypatch, torch.device("cpu"))
    assert torch.equal(by_kernel.token_ids, by_torch.token_ids)
    torch.testing.assert_close(
        by_kernel.probabilities, by_torch.probabilities, rtol=1e-5, atol=1e-6
    )
    assert torch.equal(by_kernel.entropies, by_torch.entropies)


def test_log_probabilities_are_of_what_the_model_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A banned token would vanish from the alternatives, and the rest be renormalised."""
    whole, head, _ = predicted(34, monkeypatch)
    assert not set(whole.token_ids[head.slices[2]].tolist()) & {1, 2, 3}
    shown = of_host(whole.logprobs[2]).token_ids[:, 1:]
    assert set(shown.ravel().tolist()) & {1, 2, 3}, "the seed shows nothing"


@pytest.mark.parametrize("rows_at_once", [1, 3, 8, 20])
def test_a_grammar_binds_the_first_row_of_its_request(rows_at_once: int) -> None:
    """Some rows at a time, a vocabulary that ends within a word, and bits of all signs."""
    vocabulary, counts, bound = 101, (3, 1, 5, 2, 4), (0, 1, 3)
    rng = np.random.default_rng(rows_at_once)
    may = rng.random((len(counts), 128)) < 0.3
    bits = np.packbits(may, axis=1, bitorder="little").view(np.int32)
    plans = [plan(10 * i, count, None) for i, count in enumerate(counts)]
    for index in bound:
        plans[index] = replace(plans[index], allowed=bits[index])
    ends = np.cumsum(counts).tolist()
    slices = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    upload = Upload(DEVICE)
    allowed = AllowedTokens(plans, slices, vocabulary, upload)
    upload.send()
    logits = torch.randn(ends[-1], vocabulary, generator=torch.Generator().manual_seed(3))
    expected = logits.clone()
    for index in bound:
        expected[slices[index].start, ~torch.from_numpy(may[index, :vocabulary])] = -torch.inf
    found = logits.to(DEVICE)
    for start in range(0, len(found), rows_at_once):
        rows = slice(start, min(start + rows_at_once, len(found)))
        allowed.apply(found[rows], rows)
    assert torch.equal(found.cpu(), expected)
