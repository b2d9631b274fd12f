# SPDX-License-Identifier: Apache-2.0
"""Decoding without a cache, LLaDA's own schedule, and the dual cache."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device import DEVICE
from tests.golden import fixed_steps
from vllm_elastic.reference import (
    DecodingOptions,
    DualCacheOptions,
    LowConfidenceOptions,
    decode,
    dual_cache,
    low_confidence,
)
from vllm_elastic.reference.low_confidence import tokens_to_transfer

prompts = st.lists(st.integers(0, 12), min_size=1, max_size=9)


def probabilities(model, tokens: list[int]) -> torch.Tensor:
    logits = model.head(model.forward(torch.tensor(tokens))).double()
    logits[:, model.config.mask_token_id] = -torch.inf
    return logits.softmax(dim=-1)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    prompt=prompts,
    max_tokens=st.integers(1, 14),
    window=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.4, 0.6, 0.9, 1.1]),
    per_step=st.sampled_from([None, None, 1, 3]),
    shift=st.sampled_from([0, 1]),
)
def test_decode_is_the_obvious_loop(llada, prompt, max_tokens, window, threshold, per_step, shift):
    model = llada("gqa", shift=shift)
    mask, eos = model.config.mask_token_id, model.config.eos_token_id
    tokens, open_, committed = prompt + [mask] * max_tokens, set(), []
    open_ = set(range(len(prompt), len(tokens)))
    while open_:
        looked_at = sorted(open_)[:window]
        best = {i: probabilities(model, tokens)[i - shift].max(dim=0) for i in looked_at}
        top = max(float(best[i][0]) for i in looked_at)
        if per_step is None:
            now = [i for i in looked_at if float(best[i][0]) >= min(threshold, top)]
        else:
            now = sorted(sorted(looked_at, key=lambda i: (-float(best[i][0]), i))[:per_step])
        for i in now:
            tokens[i] = int(best[i][1])
        end = min([i for i in range(len(prompt), len(tokens)) if tokens[i] == eos], default=999)
        open_ = {i for i in open_ if i not in now and i < end}
        committed.append(now)

    options = DecodingOptions(window=window, threshold=threshold, tokens_per_step=per_step)
    result = decode(model, prompt, max_tokens, options)
    assert result.canvas_ids == tokens
    assert [p["committed"] for p in result.steps] == committed
    response = tokens[len(prompt) :]
    assert result.token_ids == response[: response.index(eos) if eos in response else None]
    assert result.row_layers == result.full_row_layers == len(tokens) * 4 * len(committed)
    assert {p["kind"] for p in result.steps[1:]} <= {"full"}
    assert result.steps[0]["kind"] == "first"


@pytest.mark.parametrize("options", [{"window": 0}, {"tokens_per_step": 0}, {"commit": "sure"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        DecodingOptions(**options)


class AsGiven:
    """A model whose confidences are the golden file's, whatever the canvas holds."""

    device = DEVICE
    config = SimpleNamespace(
        mask_token_id=1, eos_token_id=None, logits_shift=0,
        max_sequence_length=99, embedding_size=2, n_layers=1,
    )  # fmt: skip

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.arange(len(tokens), device=DEVICE)

    def head(self, positions: torch.Tensor) -> torch.Tensor:
        """Token 0 has the position's confidence, 2 to 5 share the rest, 1 is the mask."""
        answer = (positions - fixed_steps.PROMPT_LENGTH).tolist()
        confidence = [fixed_steps.CONFIDENCE[p] for p in answer]
        p = torch.tensor(confidence, dtype=torch.float64, device=DEVICE)
        other = (1 - p) / 4
        return torch.stack([p, torch.ones_like(p), *[other] * 4], dim=1).log()


@pytest.mark.parametrize(("steps", "block_length", "committed"), fixed_steps.LOW_CONFIDENCE)
def test_fixed_steps_by_hand(steps, block_length, committed):
    prompt, tokens = [0] * fixed_steps.PROMPT_LENGTH, len(fixed_steps.CONFIDENCE)
    result = low_confidence(AsGiven(), prompt, tokens, LowConfidenceOptions(steps, block_length))
    answer = [[p - len(prompt) for p in step["committed"]] for step in result.steps]
    assert answer == committed
    assert result.token_ids == [0] * tokens


@pytest.mark.parametrize(("masked", "steps", "shares"), fixed_steps.SHARES)
def test_shares_by_hand(masked, steps, shares):
    assert tokens_to_transfer(masked, steps) == shares


@settings(derandomize=True)
@given(st.integers(0, 300), st.integers(1, 300))
def test_tokens_to_transfer_are_equal_shares(masked, steps):
    shares = tokens_to_transfer(masked, steps)
    assert len(shares) == steps
    assert sum(shares) == masked
    assert shares == sorted(shares, reverse=True)
    assert shares[0] - shares[-1] <= 1


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(("steps", "block"), [(12, 12), (4, 12), (5, 12), (6, 4), (6, 6), (24, 6)])
def test_low_confidence_is_lladas_loop(llada, steps, block, shift):
    """Against LLaDA's algorithm said again over the whole canvas: candidates everywhere, those
    outside the block out of the running, the k best of the rest kept."""
    model = llada("mha", vocab=30, shift=shift)
    mask = model.config.mask_token_id
    prompt, max_tokens = [3, 1, 4, 1, 5], 12
    tokens = torch.tensor(prompt + [mask] * max_tokens)
    per_block = steps // (max_tokens // block)
    kept = []
    for start in range(5, 17, block):
        base, rest = divmod(block, per_block)
        for step in range(per_block):
            confidence, best = probabilities(model, tokens.tolist()).max(dim=-1)
            confidence, best = confidence.roll(shift), best.roll(shift)
            confidence[tokens != mask] = -torch.inf
            confidence[start + block :] = -torch.inf
            k = base + 1 if step < rest else base
            now = confidence.topk(k).indices
            tokens[now] = best[now]
            kept.append(sorted(now.tolist()))
    result = low_confidence(model, prompt, max_tokens, LowConfidenceOptions(steps, block))
    assert result.canvas_ids == tokens.tolist()
    assert [p["committed"] for p in result.steps] == kept
    assert result.denoising_steps == steps


@pytest.mark.parametrize(("steps", "block"), [(12, 5), (5, 4), (0, 4), (12, 0)])
def test_low_confidence_needs_whole_blocks_and_equal_steps(llada, steps, block):
    with pytest.raises(ValueError, match="blocks"):
        low_confidence(llada(), [1], 12, LowConfidenceOptions(steps, block))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", ["mha", "mqa-tied"])
def test_dual_cache_of_one_position_recomputes_everything(llada, shape, shift):
    model = llada(shape, shift=shift)
    dual = dual_cache(model, [4, 2], 11, DualCacheOptions(block_length=1))
    none = decode(model, [4, 2], 11, DecodingOptions(window=1))
    assert dual.canvas_ids == none.canvas_ids
    assert dual.steps == none.steps


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", ["mha", "gqa", "gqa6-tied"])
def test_dual_cache_refreshes_at_each_new_block_and_only_there(endless, shape, shift):
    model, prompt, length = endless(shape, shift=shift), [4, 2, 9], 5
    result = dual_cache(model, prompt, 13, DualCacheOptions(block_length=length, threshold=0.6))
    tokens = prompt + [model.config.mask_token_id] * 13
    blocks = [range(3, 8), range(8, 13), range(13, 16)]
    for step in result.steps:
        block = blocks[0]
        fresh = not any(tokens[i] != model.config.mask_token_id for i in block)
        kind = ("first" if step["denoising_step"] == 0 else "full") if fresh else "window"
        assert (step["kind"], step["rows"]) == (kind, 16 if fresh else len(block) + shift)
        assert set(step["committed"]) <= set(block)
        if fresh:  # nothing stale: as without a cache
            confidence, best = (x.roll(shift) for x in probabilities(model, tokens).max(dim=-1))
            top = max(confidence[i] for i in block)
            assert step["committed"] == [i for i in block if confidence[i] >= min(0.6, top)]
            assert [result.canvas_ids[i] for i in step["committed"]] == best[
                step["committed"]
            ].tolist()
        for i in step["committed"]:
            tokens[i] = result.canvas_ids[i]
        if all(tokens[i] != model.config.mask_token_id for i in block):
            blocks.pop(0)
    assert not blocks
    assert result.row_layers == sum(4 * step["rows"] for step in result.steps)
    assert any(step["kind"] == "window" for step in result.steps)


@pytest.mark.parametrize("shift", [0, 1])
def test_dual_cache_rows_attend_to_stale_keys(endless, shift):
    """A window pass: the block's rows over the others as the last full pass left them."""
    model, prompt = endless("gqa", shift=shift), [4, 2, 9]
    options = DualCacheOptions(block_length=6, tokens_per_step=2)
    result = dual_cache(model, prompt, 6, options)
    tokens = torch.tensor(prompt + [model.config.mask_token_id] * 6)
    block, inside, outside = torch.arange(3, 9), torch.arange(3 - shift, 9), torch.arange(3 - shift)
    stale, hidden = [], model.embed(tokens)
    for layer in range(4):
        q, k, v = model.project(layer, hidden, torch.arange(9))
        stale.append((k[:, outside], v[:, outside]))
        hidden = model.finish(layer, hidden, model.attend(q, k, v))
    first = result.steps[0]["committed"]
    tokens[first] = torch.tensor(result.canvas_ids)[first]
    hidden = model.embed(tokens[inside])
    for layer in range(4):
        q, k, v = model.project(layer, hidden, inside)
        k, v = torch.cat([stale[layer][0], k], 1), torch.cat([stale[layer][1], v], 1)
        hidden = model.finish(layer, hidden, model.attend(q, k, v))
    logits = model.head(hidden)[:6]  # shifted, the last row predicts a position beyond the block
    logits[:, model.config.mask_token_id] = -torch.inf
    confidence, best = logits.double().softmax(dim=-1).max(dim=-1)
    confidence[tokens[block] != model.config.mask_token_id] = -1
    second = sorted(block[confidence.topk(2).indices].tolist())
    assert result.steps[1]["committed"] == second
    assert [result.canvas_ids[i] for i in second] == [int(best[i - 3]) for i in second]


def test_dual_cache_takes_no_step_in_a_dropped_block(llada):
    model = llada("gqa")
    eos = model.config.eos_token_id
    results = [
        dual_cache(model, [a, b], 12, DualCacheOptions(block_length=4))
        for a in range(6)
        for b in range(6)
    ]
    ended = [r for r in results if r.dropped]
    assert ended, "no prompt made the model end early: choose other seeds"
    for result in ended:
        end = result.canvas_ids.index(eos, 2)
        masked = [i for i, t in enumerate(result.canvas_ids) if t == model.config.mask_token_id]
        assert result.dropped == masked
        assert min(masked) > end
        last_block = 2 + (end - 2) // 4 * 4 + 4
        assert all(max(p["committed"]) < last_block for p in result.steps)
