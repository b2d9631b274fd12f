# SPDX-License-Identifier: Apache-2.0
"""Dream's own decoding by hand."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from tests.device import DEVICE
from tests.golden import dream_steps
from vllm_elastic.reference import DiffusionOptions, diffusion
from vllm_elastic.reference.diffusion import confidences, gumbel, shaped

PROMPT = [0, 0, 0]


class AsGiven:
    """A model whose answer positions have the golden file's odds, whatever the canvas holds.

    Its vocabulary: three tokens with odds, and the mask.
    """

    device = DEVICE
    config = SimpleNamespace(
        mask_token_id=3, eos_token_id=None, logits_shift=1,
        max_sequence_length=99, embedding_size=4, n_layers=1,
    )  # fmt: skip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(tokens), device=DEVICE)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        first = len(PROMPT) - 1  # the row that the first mask is read from
        odds = [dream_steps.ODDS[(row - first) % 4] for row in rows.tolist()]
        rows = [[*row, 1000] for row in odds]
        return torch.tensor(rows, dtype=torch.float64, device=DEVICE).log()


def commits(tokens: int, options: DiffusionOptions, random=None) -> list[list[int]]:
    result = diffusion(AsGiven(), PROMPT, tokens, options, random)
    assert result.token_ids == [0] * tokens
    return [[p - len(PROMPT) for p in step["committed"]] for step in result.steps]


@pytest.mark.parametrize(("masks", "steps", "shares"), dream_steps.SHARES)
def test_shares_by_hand(masks, steps, shares):
    found = commits(masks, DiffusionOptions(steps, "maskgit_plus"))
    assert [len(committed) for committed in found] == shares
    assert sorted(itertools.chain(*found)) == list(range(masks))


@pytest.mark.parametrize("alg", dream_steps.DECODED)
def test_decoded_by_hand(alg):
    assert commits(4, DiffusionOptions(4, alg)) == dream_steps.DECODED[alg]


@pytest.mark.parametrize("alg", dream_steps.CONFIDENCES)
def test_confidences_by_hand(alg):
    logits = torch.tensor(dream_steps.ODDS, dtype=torch.float64).log()
    found = confidences(logits.softmax(-1), logits.argmax(-1), alg)
    assert found.tolist() == pytest.approx(dream_steps.CONFIDENCES[alg], abs=1e-6)


@pytest.mark.parametrize(("row", "top_p", "alg", "expected"), dream_steps.SAMPLED)
def test_sampled_by_hand(row, top_p, alg, expected):
    odds = torch.tensor(dream_steps.ODDS[row], dtype=torch.float64)
    options = DiffusionOptions(1, alg, temperature=0.5, top_p=top_p)
    logits = shaped(odds.log().expand(3, -1), options)
    probabilities = logits.softmax(-1)
    found = confidences(probabilities, torch.arange(3), alg).tolist()
    kept = {t: found[t] for t in range(3) if probabilities[0, t] > 0}
    assert kept == pytest.approx(expected, abs=1e-6)


class Numbers:
    """0.75 at even canvas positions, 0.25 at odd ones; in step 2 the other way round."""

    def of_positions(self, step, count):
        numbers = [(0.75, 0.25)[(p + (step == 2)) % 2] for p in range(count)]
        return torch.tensor(numbers, dtype=torch.float64, device=DEVICE)


def test_origin_by_hand():
    """Chances: 0.25, 0.333, 0.499 and 1; the answer is positions 3 to 6."""
    found = commits(4, DiffusionOptions(4, "origin"), Numbers())
    # 0.25 is not below 0.24975; below 0.3329 in step 1, at positions 3 and 5; in step 2 at 4 and 6.
    assert found == [[], [0, 2], [1, 3]]


def test_a_draw_of_commits_by_hand():
    """ln(1 / ln 4) = -0.327 and -ln(-ln 0.75) = 1.246: with alg_temp 1 the noise decides."""
    assert gumbel(torch.tensor([0.25, 0.75])).tolist() == pytest.approx([-0.326634, 1.245899])
    options = DiffusionOptions(4, "maskgit_plus", alg_temp=1.0)
    # Step 1: 0.75 at 4 and 6, of which 4 is surer (0.55, 0.50). Step 2: at 3 and 5 (0.60, 0.45).
    assert commits(4, options, Numbers()) == [[], [1], [0], [2, 3]]
