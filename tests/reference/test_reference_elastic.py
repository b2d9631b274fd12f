# SPDX-License-Identifier: Apache-2.0
"""Elastic-Cache against a literal second telling of it, and by its properties.

The second telling, ``Literal``, differs from the oracle wherever the two may: it keeps a cache
of all queries (as the released code does) where the oracle projects stored hidden states, runs
a refreshing step as an engine does (window pass through all layers, thrown away, then a replay)
where the oracle walks once, and works position by position with Python lists and sets.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_elastic.reference import (
    DecodingOptions,
    ElasticCache,
    ElasticOptions,
    LLaDA,
    decode,
    elastic_cache,
)
from vllm_elastic.reference.canvas import Canvas
from vllm_elastic.reference.elastic_cache import most_attended

STATISTICS = ["released", "paper"]
ALWAYS, NEVER = 1.01, 0.0


class Literal:
    """Elastic-Cache, one request, told position by position."""

    def __init__(self, model: LLaDA, prompt: list[int], max_tokens: int, o: ElasticOptions):
        self.model, self.o, self.layers = model, o, model.config.n_layers
        self.shift = model.config.logits_shift
        self.tokens = prompt + [model.config.mask_token_id] * max_tokens
        self.response = range(len(prompt), len(self.tokens))
        self.masked = set(self.response)
        self.dropped: set[int] = set()
        self.first_eos: int | None = None
        # [layer][position]: what that position last computed there
        self.q, self.k, self.v, self.h = (
            [[None] * len(self.tokens) for _ in range(self.layers)] for _ in range(4)
        )
        self.tracked: set[int] = set()
        self.committed: list[int] = []
        self.steps: list[dict] = []
        self.similarities: list[list[float]] = []
        while self.masked - self.dropped:
            self.step(len(self.similarities))

    def attention(self, queries, keys) -> torch.Tensor:
        """One position's queries (H, D) over a list of T keys (K, D) -> (H, T)."""
        share = self.model.config.n_heads // self.model.config.n_kv_heads
        keys = torch.stack(keys, dim=1).repeat_interleave(share, dim=0)
        scores = torch.einsum("hd,htd->ht", queries, keys) / math.sqrt(queries.shape[-1])
        return scores.softmax(dim=-1)

    def run(self, layer: int, inputs: dict[int, torch.Tensor]):
        """One layer for some positions: their outputs, their attention rows."""
        share = self.model.config.n_heads // self.model.config.n_kv_heads
        for i, hidden in inputs.items():
            q, k, v = self.model.project(layer, hidden[None], torch.tensor([i]))
            self.q[layer][i], self.k[layer][i], self.v[layer][i] = q[:, 0], k[:, 0], v[:, 0]
            self.h[layer][i] = hidden
        outputs, rows = {}, {}
        for i, hidden in inputs.items():
            rows[i] = self.attention(self.q[layer][i], self.k[layer])
            values = torch.stack(self.v[layer], dim=1).repeat_interleave(share, dim=0)
            mixed = torch.einsum("ht,htd->hd", rows[i], values).flatten()
            outputs[i] = self.model.finish(layer, hidden[None], mixed[None])[0]
        return outputs, rows

    def alike(self, a: torch.Tensor, b: torch.Tensor) -> float:
        """(H, T) before and after, of one tracked position."""
        if self.o.statistic == "released":
            a, b = a.T, b.T
        norm = lambda x: max(math.sqrt(sum(e * e for e in x)), 1e-8)  # noqa: E731
        pairs = list(zip(a.tolist(), b.tolist(), strict=True))
        dot = lambda x, y: sum(e * f for e, f in zip(x, y, strict=True))  # noqa: E731
        return sum(dot(x, y) / norm(x) / norm(y) for x, y in pairs) / len(pairs)

    def favourites(self, rows, window: list[int]) -> set[int]:
        mass = sum(rows[i - self.shift].sum(dim=0) for i in window).tolist()
        seen = [i for i in range(len(self.tokens)) if i not in self.masked]
        return set(sorted(seen, key=lambda i: (-mass[i], i))[: self.o.track_num])

    def step(self, number: int) -> None:
        o, everyone = self.o, range(len(self.tokens))
        window = sorted(self.masked - self.dropped)[: o.window]
        predicting = {i - self.shift for i in window}
        at = sorted({*self.tracked, *self.committed, *predicting}) if number else list(everyone)
        state = {i: self.model.embed(torch.tensor([self.tokens[i]]))[0] for i in at}
        similarities, favourites = [], []
        for layer in range(self.layers):
            old = {t: self.attention(self.q[layer][t], self.k[layer]) for t in self.tracked}
            state, rows = self.run(layer, state)
            favourites.append(self.favourites(rows, window))
            if self.tracked:
                each = [self.alike(old[t], rows[t]) for t in self.tracked]
                similarities.append(sum(each) / len(each))
        self.steps.append(
            {
                "denoising_step": number,
                "kind": "window" if number else "first",
                "start_layer": 0,
                "rows": len(at),
                "committed": [],
            }
        )
        low = [layer for layer, s in enumerate(similarities) if s < o.gamma]
        if low and low[0] + 1 < self.layers:
            start = low[0] + 1
            similarities, favourites = similarities[:start], favourites[:start]
            state = dict(enumerate(self.h[start]))
            for layer in range(start, self.layers):
                state, rows = self.run(layer, state)
                favourites.append(self.favourites(rows, window))
            self.steps.append(
                {
                    "denoising_step": number,
                    "kind": "replay",
                    "start_layer": start,
                    "rows": len(self.tokens),
                    "committed": [],
                }
            )
        self.similarities.append(similarities)
        self.commit({i: self.model.head(state[i - self.shift][None])[0] for i in window})
        self.tracked = set().union(*favourites)

    def commit(self, logits: dict[int, torch.Tensor]) -> None:
        mask, eos = self.model.config.mask_token_id, self.model.config.eos_token_id
        best = {}
        for i, row in logits.items():
            row = row.double().softmax(dim=-1)
            row[mask] = 0
            best[i] = ((row / row.sum()).max().item(), int(row.argmax()))
        bar = min(self.o.threshold, max(p for p, _ in best.values()))
        if self.o.tokens_per_step is None:
            self.committed = [i for i in best if best[i][0] >= bar]
        else:
            ranked = sorted(best, key=lambda i: (-best[i][0], i))
            self.committed = sorted(ranked[: self.o.tokens_per_step])
        for i in self.committed:
            self.tokens[i] = best[i][1]
            self.masked.remove(i)
        ends = [i for i in self.committed if self.tokens[i] == eos]
        if ends and (self.first_eos is None or self.o.drop_after_every_eos):
            if self.first_eos is None or ends[0] < self.first_eos:
                self.first_eos = ends[0]
            self.dropped |= {i for i in self.masked if i > self.first_eos}
        self.steps[-1]["committed"] = self.committed


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shape=st.sampled_from(["mha", "gqa", "mqa-tied", "gqa6-tied"]),
    layers=st.sampled_from([1, 2, 4]),
    shift=st.sampled_from([0, 1]),
    prompt=st.lists(st.integers(0, 12), min_size=1, max_size=7),
    max_tokens=st.integers(1, 12),
    options=st.builds(
        ElasticOptions,
        window=st.integers(1, 14),
        threshold=st.sampled_from([0.4, 0.5, 0.9, 1.1]),
        tokens_per_step=st.sampled_from([None, None, None, 1, 2]),
        drop_after_every_eos=st.booleans(),
        gamma=st.sampled_from([NEVER, 0.85, 0.9, 0.93, 0.96, ALWAYS]),
        track_num=st.sampled_from([1, 1, 2, 30]),
        statistic=st.sampled_from(STATISTICS),
    ),
)
def test_oracle_and_literal_telling_agree(llada, shape, layers, shift, prompt, max_tokens, options):
    model = llada(shape, layers=layers, shift=shift)
    expected = Literal(model, prompt, max_tokens, options)
    result = elastic_cache(model, prompt, max_tokens, options)
    assert result.steps == expected.steps
    assert result.canvas_ids == expected.tokens
    assert result.dropped == sorted(expected.dropped)
    for got, wanted in zip(result.similarities, expected.similarities, strict=True):
        assert got == pytest.approx(wanted, abs=2e-5)


def test_the_comparison_above_meets_every_case(llada):
    """Replays from every layer, unused triggers, ends: else agreeing on them would be empty."""
    start_layers: Counter[int] = Counter()
    last_layer_triggers = dropped = several_commits = 0
    for seed in range(12):
        for statistic in STATISTICS:
            options = ElasticOptions(window=6, threshold=0.5, gamma=0.93, statistic=statistic)
            result = elastic_cache(llada("gqa"), [1 + seed % 5, seed], 12, options)
            start_layers.update(p["start_layer"] for p in result.steps)
            last_layer_triggers += sum(len(s) == 4 and s[3] < 0.93 for s in result.similarities)
            dropped += bool(result.dropped)
            several_commits += any(len(p["committed"]) > 1 for p in result.steps)
    assert set(start_layers) == {0, 1, 2, 3}
    assert min(last_layer_triggers, dropped, several_commits) > 0


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("gamma", [NEVER, 0.9, ALWAYS])
@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_with_every_row_in_every_window_pass_it_is_no_cache(endless, shape, gamma, statistic):
    """Window and track_num as large as the canvas: every pass computes everything."""
    model = endless(shape, vocab=40)
    for prompt in ([3, 1], [7, 7, 20, 11, 5]):
        options = ElasticOptions(
            window=20, threshold=0.4, gamma=gamma, track_num=40, statistic=statistic
        )
        elastic = elastic_cache(model, prompt, 13, options)
        none = decode(model, prompt, 13, DecodingOptions(window=20, threshold=0.4))
        assert elastic.canvas_ids == none.canvas_ids
        commits = [p["committed"] for p in elastic.steps if p["committed"]]
        assert commits == [p["committed"] for p in none.steps]
        assert {p["rows"] for p in elastic.steps} == {len(prompt) + 13}


@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("shape", ["mha", "mqa-tied"])
def test_first_step_is_that_of_no_cache(llada, shape, window):
    model = llada(shape, vocab=40)
    elastic = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(window=window, threshold=0.3))
    none = decode(model, [3, 1, 4], 20, DecodingOptions(window=window, threshold=0.3))
    assert elastic.steps[0] == none.steps[0]
    for position in elastic.steps[0]["committed"]:
        assert elastic.canvas_ids[position] == none.canvas_ids[position]


def test_never_and_always(llada):
    model = llada("mha", vocab=40)
    never = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(window=6, gamma=NEVER))
    assert [p["kind"] for p in never.steps] == ["first"] + ["window"] * (never.passes - 1)
    assert [len(s) for s in never.similarities] == [0] + [4] * (never.passes - 1)
    always = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(window=6, gamma=ALWAYS))
    assert [p["kind"] for p in always.steps[1:]] == ["window", "replay"] * (
        always.denoising_steps - 1
    )
    assert all(p["start_layer"] == 1 for p in always.steps if p["kind"] == "replay")
    assert [len(s) for s in always.similarities] == [0] + [1] * (always.denoising_steps - 1)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_a_similarity_equal_to_gamma_does_not_trigger(llada, statistic):
    model = llada("mha", vocab=40)
    options = {"window": 6, "statistic": statistic}
    never = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(gamma=NEVER, **options))
    lowest = min(never.similarities[1][:3])
    equal = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(gamma=lowest, **options))
    assert equal.steps[:2] == never.steps[:2]
    above = math.nextafter(lowest, 2)
    higher = elastic_cache(model, [3, 1, 4], 20, ElasticOptions(gamma=above, **options))
    assert higher.steps[2]["kind"] == "replay"
    assert higher.steps[2]["start_layer"] == never.similarities[1].index(lowest) + 1


def test_one_layer_has_nothing_to_refresh(llada):
    result = elastic_cache(llada("gqa", layers=1), [3, 1], 9, ElasticOptions(window=4, gamma=2.0))
    assert {p["kind"] for p in result.steps} == {"first", "window"}
    assert any(s and s[0] < 2 for s in result.similarities)


def stepper(model: LLaDA, prompt: list[int], max_tokens: int, **options) -> ElasticCache:
    return ElasticCache(model, Canvas(model, prompt, max_tokens), ElasticOptions(**options))


@pytest.mark.parametrize("gamma", [NEVER, 0.95, ALWAYS])
def test_what_is_stored_where(endless, gamma):
    """Layers that did not refresh change at the rows only, the others everywhere."""
    decoder = stepper(endless("gqa", vocab=40), [3, 1, 4, 1, 5], 14, window=5, gamma=gamma)
    decoder.step()
    while True:
        rows = decoder.rows(decoder.canvas.window(5)).tolist()
        before = [x.clone() for x in (decoder.cache.keys, decoder.cache.values)]
        hidden = decoder.cache.hidden.clone()
        if not decoder.step():
            break
        last = decoder.result.steps[-1]
        start = last["start_layer"] if last["kind"] == "replay" else 4
        others = [i for i in range(19) if i not in rows]
        for layer in range(4):
            same = [
                (old[layer] == new[layer]).all(dim=(0, 2))
                for old, new in zip(before, (decoder.cache.keys, decoder.cache.values), strict=True)
            ]
            same.append((hidden[layer] == decoder.cache.hidden[layer]).all(dim=1))
            if layer < start:
                assert all(s[others].all() for s in same)
            elif layer == start:  # stale inputs: others' hidden states stay as they were stored
                assert same[2][others].all()
            else:
                assert not any(s[others].all() for s in same)
    assert not decoder.cache.keys.isnan().any()


@pytest.mark.parametrize("gamma", [NEVER, 0.95, ALWAYS])
def test_layer_0_is_never_stale_but_for_the_last_commits(endless, gamma):
    """Layer 0's input is the token alone, and each commit is recomputed in the next step."""
    model = endless("mha", vocab=40)
    decoder = stepper(model, [3, 1, 4], 14, window=5, threshold=0.3, gamma=gamma)
    everywhere = torch.arange(17)
    while True:
        tokens = decoder.canvas.tokens.clone()
        if not decoder.step():
            break
        _, keys, values = model.project(0, model.embed(tokens), everywhere)
        torch.testing.assert_close(decoder.cache.keys[0], keys)
        torch.testing.assert_close(decoder.cache.values[0], values)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    prompt=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    max_tokens=st.integers(1, 16),
    window=st.integers(1, 18),
    threshold=st.sampled_from([0.4, 0.9]),
    gamma=st.sampled_from([NEVER, 0.93, ALWAYS]),
    track_num=st.integers(1, 3),
)
def test_rows_commits_and_work(llada, prompt, max_tokens, window, threshold, gamma, track_num):
    model = llada("gqa")
    decoder = stepper(
        model, prompt, max_tokens,
        window=window, threshold=threshold, gamma=gamma, track_num=track_num,
    )  # fmt: skip
    length, expected_work, untracked_recomputations = len(prompt) + max_tokens, 0, Counter()
    while len(looked_at := decoder.canvas.window(window)):
        rows = decoder.rows(looked_at)
        wanted = {*decoder.tracked.tolist(), *decoder.committed.tolist(), *looked_at.tolist()}
        first = decoder.result.denoising_steps == 0
        assert rows.tolist() == (list(range(length)) if first else sorted(wanted))
        unmasked = set((~decoder.canvas.masked).nonzero().flatten().tolist())
        if not first:
            assert 1 <= len(decoder.tracked) <= 4 * track_num
            assert set(decoder.tracked.tolist()) <= unmasked - set(decoder.committed.tolist())
            untracked_recomputations.update(
                i for i in unmasked & set(rows.tolist()) if i not in decoder.tracked
            )
        decoder.step()
        assert len(decoder.committed) >= 1
        assert set(decoder.committed.tolist()) <= set(looked_at.tolist())
        expected_work += len(rows) * 4
        last = decoder.result.steps[-1]
        if last["kind"] == "replay":
            expected_work += length * (4 - last["start_layer"])
    result = decoder.result
    commits = [i for p in result.steps for i in p["committed"]]
    assert len(commits) == len(set(commits))
    assert sorted(commits + decoder.canvas.dropped.nonzero().flatten().tolist()) == list(
        range(len(prompt), length)
    )
    # Once each, but for the last step's commits, after which nothing is computed.
    assert untracked_recomputations == Counter(set(commits) - set(decoder.committed.tolist()))
    assert result.row_layers == expected_work
    assert result.full_row_layers == length * 4 * result.denoising_steps
    replayed = [a for a, b in zip(result.steps, result.steps[1:], strict=False)
                if b["kind"] == "replay"]  # fmt: skip
    assert all(p["kind"] == "window" and p["committed"] == [] for p in replayed)


def test_most_attended_leaves_masked_out_and_prefers_the_smaller_position():
    row = torch.tensor([0.1, 0.2, 0.2, 0.05, 0.45])
    masked = torch.tensor([False, False, False, False, True])
    probabilities = row.expand(2, 3, 5)
    assert most_attended(probabilities, masked, 1).tolist() == [1]
    assert most_attended(probabilities, masked, 3).tolist() == [1, 2, 0]
    assert most_attended(probabilities, masked, 9).tolist() == [1, 2, 0, 3]


def test_most_attended_sums_over_heads_and_window_rows():
    probabilities = torch.tensor([[[0.6, 0.4], [0.6, 0.4]], [[0.6, 0.4], [0.0, 1.0]]])
    assert most_attended(probabilities, torch.tensor([False, False]), 1).tolist() == [1]


@pytest.mark.parametrize("wrong", [{"track_num": 0}, {"statistic": "cosine"}, {"window": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ElasticOptions(**wrong)
