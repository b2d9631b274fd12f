# SPDX-License-Identifier: Apache-2.0
"""Canvas, candidates, commit rules, and the end at an EOS. EOS is 12, the mask 13."""

from __future__ import annotations

import math

import pytest
import torch

from tests.golden import commit_rule, commit_rules, end_options
from vllm_elastic.reference import margin
from vllm_elastic.reference.canvas import Canvas
from vllm_elastic.reference.commit import CommitOptions, Evidence, candidates, choose, entropies
from vllm_elastic.reference.result import DecodingResult


def tensor(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_window_skips_holes_and_keeps_its_size(llada):
    canvas = Canvas(llada(), [1, 2, 3], 6)
    canvas.commit(tensor(3, 5), tensor(7, 7))
    assert canvas.window(3).tolist() == [4, 6, 7]
    assert canvas.window(99).tolist() == [4, 6, 7, 8]
    assert canvas.tokens.tolist() == [1, 2, 3, 7, 13, 7, 13, 13, 13]


def test_masked_positions_beyond_an_eos_are_dropped_and_stay_masked(llada):
    canvas = Canvas(llada(), [1], 6)
    canvas.commit(tensor(3, 5), tensor(12, 7))
    assert canvas.open().tolist() == [1, 2]
    assert canvas.dropped.nonzero().flatten().tolist() == [4, 6]
    assert canvas.masked.nonzero().flatten().tolist() == [1, 2, 4, 6]
    assert canvas.tokens.tolist() == [1, 13, 13, 12, 13, 7, 13]


def test_of_several_eos_in_one_commit_the_leftmost_counts(llada):
    for after_every in (True, False):
        canvas = Canvas(llada(), [1], 6, after_every)
        canvas.commit(tensor(2, 5), tensor(12, 12))
        assert canvas.open().tolist() == [1]


@pytest.mark.parametrize(("after_every", "left"), [(True, [1]), (False, [1, 3, 4])])
def test_a_later_eos_that_is_earlier(llada, after_every, left):
    canvas = Canvas(llada(), [1], 6, after_every)
    canvas.commit(tensor(5), tensor(12))
    assert canvas.open().tolist() == [1, 2, 3, 4]
    canvas.commit(tensor(2), tensor(12))
    assert canvas.open().tolist() == left


def test_an_eos_in_the_prompt_ends_nothing(llada):
    canvas = Canvas(llada(), [12, 1], 2)
    canvas.commit(tensor(2), tensor(5))
    assert canvas.open().tolist() == [3]
    canvas.commit(tensor(3), tensor(12))
    assert canvas.answer() == [5]


def test_answer_stops_before_the_first_eos(llada):
    canvas = Canvas(llada(), [1], 4)
    canvas.commit(tensor(1, 2, 3, 4), tensor(5, 12, 6, 12))
    assert canvas.answer() == [5]


def test_without_an_eos_nothing_is_dropped(endless):
    canvas = Canvas(endless(), [1], 3)
    canvas.commit(tensor(1, 2), tensor(12, 12))
    assert canvas.open().tolist() == [3]
    assert canvas.answer() == [12, 12, 13]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 4, "at least one prompt token"),
        ([1], 0, "at least one prompt token"),
        ([1, 13], 4, "mask token 13"),
        ([1, 16], 4, r"outside 0\.\.15"),
        ([-1], 4, "outside"),
        ([1], 96, "97 positions is beyond the model's 96"),
    ],
)
@pytest.mark.parametrize("shift", [0, 1])
def test_impossible_canvases_are_refused(llada, prompt, max_tokens, message, shift):
    with pytest.raises(ValueError, match=message):
        Canvas(llada(shift=shift), prompt, max_tokens)


def test_the_mask_is_no_candidate_and_takes_no_probability():
    logits = torch.tensor([[1.0, 3.0, 9.0], [2.0, 0.0, 1.0]])
    token_ids, confidence = candidates(logits, mask_token_id=2)
    assert token_ids.tolist() == [1, 0]
    expected = [1 / (1 + math.exp(-2.0))] * 2
    assert confidence.tolist() == pytest.approx(expected, abs=1e-12)
    assert confidence.dtype == torch.float64
    assert logits[0, 2] == 9.0  # the caller's logits are left as they were


def test_equal_logits_go_to_the_smaller_token_and_a_far_mask_is_ignored():
    token_ids, confidence = candidates(torch.tensor([[0.0, 5.0, 5.0, 5.0]]), mask_token_id=4)
    assert token_ids.tolist() == [1]
    assert confidence.item() < 1 / 3


def test_confidences_are_told_apart_beyond_float32():
    logits = torch.tensor([[20.0, 0.0], [20.5, 0.0]])
    _, confidence = candidates(logits, mask_token_id=9)
    assert confidence[0] < confidence[1] < 1


@pytest.mark.parametrize(("logits_eos_inf", "confidence_eos_eot_inf"), list(end_options.CANDIDATES))
def test_lladas_end_options_by_hand(logits_eos_inf, confidence_eos_eot_inf):
    expected = end_options.CANDIDATES[logits_eos_inf, confidence_eos_eot_inf]
    token_ids, confidence = end_candidates(logits_eos_inf, confidence_eos_eot_inf)
    assert token_ids.tolist() == [token for token, _ in expected]
    assert confidence.tolist() == pytest.approx([p for _, p in expected], abs=1e-12)
    assert all(c == 0 for c, (_, p) in zip(confidence, expected, strict=True) if p == 0)


@pytest.mark.parametrize(
    ("never", "unconfident", "threshold", "count", "rows"), end_options.COMMITS
)
def test_what_is_committed_with_lladas_end_options(never, unconfident, threshold, count, rows):
    _, confidence = end_candidates(never, unconfident)
    options = CommitOptions(threshold=threshold, tokens_per_step=count)
    assert committed(confidence, options) == rows


def committed(confidence, options, positions=None, entropy=None):
    positions = torch.arange(len(confidence)) if positions is None else torch.tensor(positions)
    return choose(confidence, positions, options, Evidence(entropy)).nonzero().flatten().tolist()


def end_candidates(logits_eos_inf: bool, confidence_eos_eot_inf: bool):
    return candidates(
        torch.tensor(end_options.ODDS, dtype=torch.float64).log(),
        mask_token_id=99,
        never=(end_options.EOS,) if logits_eos_inf else (),
        unconfident=(end_options.EOS, end_options.EOT) if confidence_eos_eot_inf else (),
    )


@pytest.mark.parametrize(("values", "threshold", "count", "rows"), commit_rule.COMMITS)
def test_commit_rule_by_hand(values, threshold, count, rows):
    options = CommitOptions(threshold=threshold, tokens_per_step=count)
    assert committed(torch.tensor(values, dtype=torch.float64), options) == rows


@pytest.mark.parametrize(("settings", "positions", "values", "rows"), commit_rules.COMMITS)
def test_commit_rules_by_hand(settings, positions, values, rows):
    confidence = torch.tensor(values, dtype=torch.float64)
    assert committed(confidence, CommitOptions(**settings), positions) == rows


@pytest.mark.parametrize(("bound", "values", "entropy", "rows"), commit_rules.ENTROPY)
def test_entropy_by_hand(bound, values, entropy, rows):
    options = CommitOptions(commit="entropy", entropy_bound=bound)
    confidence = torch.tensor(values, dtype=torch.float64)
    assert committed(confidence, options, entropy=torch.tensor(entropy).double()) == rows


@pytest.mark.parametrize(("settings", "steps"), commit_rules.STEADY)
def test_steady_by_hand(settings, steps):
    options, result = CommitOptions(commit="steady", **settings), DecodingResult()
    for positions, tokens, values, rows in steps:
        at, confidence = torch.tensor(positions), torch.tensor(values, dtype=torch.float64)
        lasting = result.lasting(at, torch.tensor(tokens), confidence)
        chosen = choose(confidence, at, options, Evidence(lasting=lasting))
        assert chosen.nonzero().flatten().tolist() == rows


@pytest.mark.parametrize(("settings", "steps"), commit_rules.CREDIT)
def test_credit_by_hand(settings, steps):
    options, result = CommitOptions(commit="credit", **settings), DecodingResult()
    for positions, tokens, values, rows in steps:
        at, confidence = torch.tensor(positions), torch.tensor(values, dtype=torch.float64)
        if options.tokens_per_step is None:
            confidence = result.credited(at, torch.tensor(tokens), confidence, options)
        assert choose(confidence, at, options).nonzero().flatten().tolist() == rows


def test_entropies():
    """Of two, four and one equally likely tokens, the mask and what is never chosen left out."""
    never, mask = -3.0, 7.0
    rows = [[0, 0, -99, -99, mask, never], [1, 1, 1, 1, mask, never], [0, 99, 0, 0, mask, never]]
    logits = torch.tensor(rows, dtype=torch.float64)
    expected = [math.log(2), math.log(4), 0.0]
    assert entropies(logits, 4, (5, 77)).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_order_of_zeros_is_no_near_tie():
    """Two implementations that part there cannot blame rounding."""
    assert margin.of_ranking([0.5, 0.0, 0.0], 2) == math.inf
    assert margin.of_ranking([0.5, 0.25, 0.25], 2) == 0
