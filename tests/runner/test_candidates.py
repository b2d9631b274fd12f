# SPDX-License-Identifier: Apache-2.0
"""Candidates: the most probable, sampled, constrained; log probabilities; random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from tests.device import DEVICE
from tests.golden import dream_steps, end_options
from vllm_elastic.decoding.plan import Logprobs
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner import candidates
from vllm_elastic.runner.candidates import (
    as_dream,
    leave_out_of_confidence,
    logprobs_of,
    most_probable,
    sampled,
)
from vllm_elastic.runner.constraints import Constraints
from vllm_elastic.runner.counter_random import _mix_int, uniform
from vllm_elastic.runner.upload import Upload

from . import softmaxes

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _made_on_the_device() -> Iterator[None]:
    """What these tests make, that is: the engine names the device wherever it makes a tensor."""
    with DEVICE:
        yield


def constrained(logits: torch.Tensor, sampling: Sampling, positions: torch.Tensor) -> Constraints:
    """Applied to the logits, in place."""
    upload = Upload(DEVICE)
    constraints = Constraints(sampling, logits.shape[-1], upload)
    upload.send()
    constraints.apply(logits, positions)
    return constraints


def logits_of(rows: int, vocab: int = 11, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator, device="cpu") * 2).to(DEVICE)


def test_splitmix_matches_the_published_sequence() -> None:
    """First outputs of SplitMix64 seeded with 1234567 (the reference implementation's test)."""
    golden = 0x9E3779B97F4A7C15
    outputs = [_mix_int(1234567 + (i + 1) * golden) for i in range(3)]
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_depends_on_seed_step_position_and_token_only() -> None:
    together = uniform(5, 3, torch.tensor([7, 100, 8]), 50)
    alone = uniform(5, 3, torch.tensor([100]), 80)
    assert torch.equal(together[1], alone[0, :50])
    assert not torch.equal(together[0], together[2])
    for seed, step in ((6, 3), (5, 4)):
        assert (uniform(seed, step, torch.tensor([7]), 50) != together[0]).all()


def test_uniform_is_uniform() -> None:
    """Mean, variance and a chi-square over 64 bins of 400,000 numbers; also between rows."""
    numbers = uniform(2**63 - 1, 12, torch.arange(400), 1000)
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers, 64, 0, 1)
    expected = numbers.numel() / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 63 + 5 * (2 * 63) ** 0.5
    assert abs(float(torch.corrcoef(numbers[:2])[0, 1])) < 0.15


def test_most_probable() -> None:
    logits = logits_of(6)
    token_ids, probabilities = most_probable(logits)
    assert torch.equal(token_ids, logits.argmax(-1))
    torch.testing.assert_close(probabilities, logits.double().softmax(-1).amax(-1))
    logits[2, 4] = float("nan")
    assert torch.isnan(most_probable(logits)[1]).tolist() == [False, False, True, *[False] * 3]


@pytest.mark.parametrize("name", softmaxes.CASES)
def test_accuracy_of_probabilities(name: str) -> None:
    softmaxes.check(most_probable, softmaxes.CASES[name]())


def test_rows_that_are_all_but_sure_keep_their_order() -> None:
    """In float32 all of these are 1, and the first in the window would be committed first."""
    logits = torch.zeros(4, 1000)
    logits[:, 7] = torch.tensor([30.0, 33.0, 31.0, 32.0])
    probabilities = most_probable(logits)[1]
    assert probabilities.float().tolist() == [1.0] * 4
    assert probabilities.argsort(descending=True).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("at_once", [1 << 17, 20])
def test_entropies(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forbidden token would make them NaN, or rows worked on together would mix."""
    monkeypatch.setattr(candidates, "_NUMBERS_AT_ONCE", (at_once, at_once))
    logits = torch.tensor([[2.0, 2.0, -torch.inf, 2.0, 2.0], [0.0, 900.0, 0.0, 0.0, 0.0]])
    logits = torch.cat([logits, logits_of(4, 5)])
    logprobs = logits[2:].double().log_softmax(-1)
    expected = [math.log(4), 0.0, *(-logprobs.exp() * logprobs).sum(-1).tolist()]
    assert candidates.entropies_of(logits).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_tempered_softmax(temperature: float) -> None:
    """Chi-square of 20,000 draws; the confidence is the probability at temperature 1."""
    logits, count = logits_of(1, 7), 20_000
    token_ids, confidence = sampled(
        logits.expand(count, -1), Sampling(temperature=temperature, seed=9), 0, torch.arange(count)
    )
    expected = (logits[0].double() / temperature).softmax(-1) * count
    seen = torch.bincount(token_ids, minlength=7)
    assert float(((seen - expected) ** 2 / expected).sum()) < 6 + 5 * (2 * 6) ** 0.5
    torch.testing.assert_close(confidence, logits[0].double().softmax(-1)[token_ids])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {3, 1}),
        ({"top_p": 0.6}, {3, 1}),
        ({"top_p": 0.4}, {3}),
        ({"min_p": 0.45}, {3, 1}),
        ({"top_k": 3, "top_p": 0.99}, {3, 1, 0}),
    ],
)
def test_filters_keep_what_vllm_keeps(options: dict[str, float], kept: set[int]) -> None:
    probabilities = torch.tensor([[0.15, 0.25, 0.1, 0.5]])
    token_ids, _ = sampled(
        probabilities.log().expand(3000, -1),
        Sampling(temperature=1.0, seed=1, **options),  # type: ignore[arg-type]
        0,
        torch.arange(3000),
    )
    assert set(token_ids.tolist()) == kept


def test_constraints() -> None:
    positions = torch.tensor([4, 5, 6])
    logits = torch.zeros(3, 6)
    constrained(
        logits,
        Sampling(
            logit_bias=((2, 5.0),),
            allowed_token_ids=(1, 2, 3, 4),
            banned_token_ids=(3,),
            end_token_ids=(4,),
            first_end_position=6,
        ),
        positions,
    )
    never = float("-inf")
    early = [never, 0.0, 5.0, never, never, never]
    assert logits.tolist() == [early, early, [never, 0.0, 5.0, never, 0.0, never]]


ENDS = (end_options.EOS, end_options.EOT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
@pytest.mark.parametrize(("logits_eos_inf", "confidence_eos_eot_inf"), end_options.CANDIDATES)
def test_lladas_end_options_by_hand(
    monkeypatch: pytest.MonkeyPatch,
    logits_eos_inf: bool,
    confidence_eos_eot_inf: bool,
    rows_at_once: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(candidates, "_NUMBERS_AT_ONCE", (5 * rows_at_once,) * 2)
    logits = torch.tensor(end_options.ODDS, dtype=dtype).log()
    if logits_eos_inf:
        constrained(logits, Sampling(banned_token_ids=(end_options.EOS,)), torch.arange(5))
    token_ids, confidence = most_probable(logits)
    if confidence_eos_eot_inf:
        leave_out_of_confidence(confidence, token_ids, logits, torch.tensor(ENDS))
    expected = end_options.CANDIDATES[logits_eos_inf, confidence_eos_eot_inf]
    assert token_ids.tolist() == [token for token, _ in expected]
    assert confidence.tolist() == pytest.approx([p for _, p in expected], abs=1e-7)
    assert all(c == 0 for c, (_, p) in zip(confidence, expected, strict=True) if p == 0)


def test_confidence_of_a_sampled_token_is_without_noise_and_ends() -> None:
    rows, tokens, expected = zip(*end_options.SAMPLED, strict=True)
    logits = torch.tensor(end_options.ODDS).log()[torch.tensor(rows)]
    kept = logits.clone()
    confidence = torch.full((len(rows),), 0.5, dtype=torch.float64)
    leave_out_of_confidence(confidence, torch.tensor(tokens), logits, torch.tensor(ENDS))
    assert confidence.tolist() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(logits, kept)


def test_ends_that_are_all_there_is_or_not_there() -> None:
    """Allowed tokens that are all ends: 0, not 0 / 0. An end beyond the vocabulary: nothing."""
    logits = torch.tensor([[float("-inf"), 1.0, 2.0], [1.0, 2.0, float("nan")]])
    token_ids, confidence = most_probable(logits)
    sampling = Sampling(unconfident_token_ids=(1, 2, 126348))
    ends = constrained(logits, sampling, torch.arange(2)).unconfident
    assert ends is not None and ends.tolist() == [1, 2]
    leave_out_of_confidence(confidence, token_ids, logits, ends)
    assert confidence[0] == 0
    assert torch.isnan(confidence[1])  # a broken row is still told from an end
    logits = logits_of(2)
    token_ids, confidence = most_probable(logits)
    before = confidence.clone()
    ends = constrained(logits, Sampling(unconfident_token_ids=(11,)), torch.arange(2)).unconfident
    assert ends is not None
    leave_out_of_confidence(confidence, token_ids, logits, ends)
    torch.testing.assert_close(confidence, before)


def test_logprobs_are_of_the_token_and_the_best() -> None:
    logits = logits_of(3)
    chosen = torch.tensor([int(logits[0].argmax()), int(logits[1].argmin()), 5])
    report = Logprobs(*(part.cpu().numpy() for part in logprobs_of(logits, chosen, 2)))
    wanted = logits.log_softmax(-1)
    assert report.token_ids[:, 0].tolist() == chosen.tolist()
    assert report.ranks.tolist()[:2] == [1, 11]
    for row in range(3):
        for token, value in zip(report.token_ids[row], report.logprobs[row], strict=True):
            assert value == pytest.approx(float(wanted[row, int(token)]), abs=1e-6)
        assert report.token_ids[row, 1:].tolist() == wanted[row].topk(2).indices.tolist()
    assert logprobs_of(logits, chosen, -1)[0].shape == (3, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alg", dream_steps.CONFIDENCES)
def test_dreams_confidences_by_hand(
    alg: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_NUMBERS_AT_ONCE", (30, 30))  # rows by twos
    logits = torch.tensor(dream_steps.ODDS, dtype=dtype).log()
    # vLLM resets top_p at temperature 0; nothing is filtered then.
    token_ids, confidence = as_dream(logits, Sampling(alg=alg, top_p=0.5), 0, torch.arange(4))
    assert token_ids.tolist() == [0, 0, 0, 0]
    assert confidence.tolist() == pytest.approx(dream_steps.CONFIDENCES[alg], abs=1e-6)
    logits[1, 2] = float("nan")
    confidence = as_dream(logits, Sampling(alg=alg), 0, torch.arange(4))[1]
    assert torch.isnan(confidence).tolist() == [False, True, False, False]


@pytest.mark.parametrize(("row", "top_p", "alg", "expected"), dream_steps.SAMPLED)
def test_dreams_confidences_of_sampled_tokens_by_hand(
    row: int, top_p: float, alg: str, expected: dict[int, float]
) -> None:
    logits = torch.tensor(dream_steps.ODDS[row]).log().expand(400, -1)
    sampling = Sampling(temperature=0.5, top_p=top_p, seed=3, alg=alg)
    token_ids, confidence = as_dream(logits, sampling, 2, torch.arange(400))
    found = dict(zip(token_ids.tolist(), confidence.tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)
    plain, _ = sampled(logits, sampling, 2, torch.arange(400))
    assert torch.equal(token_ids, plain), "the same draw, another confidence"
