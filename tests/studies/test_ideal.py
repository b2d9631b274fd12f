# SPDX-License-Identifier: Apache-2.0
"""The policy that knows the true drift, and the command line of its study, on random models."""

from __future__ import annotations

import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import ideal as study
import pytest
import torch
from ideal_policy import (
    Ideal,
    IdealOptions,
    ShadowPasses,
    costliest,
    ideal,
    last_good_layer,
    refreshed_joins,
    relative_drift,
    without_cache,
)

from vllm_elastic.reference import DecodingOptions, DecodingResult, LLaDA, LLaDAConfig, decode
from vllm_elastic.reference.canvas import Canvas

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
MAX_TOKENS, WINDOW, LAYERS = 24, 5, 4
LENGTH = len(PROMPT) + MAX_TOKENS
EVERYTHING = 1e9  # a tolerance that nothing exceeds


def random_llada(seed: int = 0, eos: int | None = None) -> LLaDA:
    config = LLaDAConfig(
        d_model=32,
        n_heads=4,
        n_kv_heads=2,
        n_layers=LAYERS,
        mlp_hidden_size=48,
        vocab_size=30,
        embedding_size=30,
        max_sequence_length=64,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        weight_tying=False,
        mask_token_id=29,
        eos_token_id=eos,
    )
    return LLaDA.random(config, seed=seed)


def run(model: LLaDA, **knobs: Any) -> Any:
    return ideal(model, PROMPT, MAX_TOKENS, IdealOptions(**{"window": WINDOW, **knobs}))


def windows_and_commits(result: DecodingResult, window: int) -> list[tuple[int, int]]:
    """Of each step but the first: the size of its window, and how many were just committed."""
    open_positions, sizes = MAX_TOKENS, []
    for step, next_step in zip(result.steps, result.steps[1:], strict=False):
        open_positions -= len(step["committed"])
        sizes.append((min(window, open_positions), len(step["committed"])))
        assert next_step["denoising_step"] == step["denoising_step"] + 1
    return sizes


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("mandatory", ["window", "committed"])
@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("tokens_per_step", [None, 1])
def test_tolerance_0_decodes_as_without_a_cache(
    seed: int, mandatory: str, granularity: int, tokens_per_step: int | None
) -> None:
    """Whatever has moved at all and is attended to is recomputed: nothing stale is ever read."""
    model = random_llada(seed, eos=28)
    common: dict[str, Any] = {"threshold": 0.3, "tokens_per_step": tokens_per_step}
    plain = decode(model, PROMPT, MAX_TOKENS, DecodingOptions(window=WINDOW, **common))
    exact = run(
        model,
        **common,
        tolerance=0.0,
        slack=0.0,
        prediction_drift=0.0,
        granularity=granularity,
        mandatory=mandatory,
    )
    assert exact.canvas_ids == plain.canvas_ids
    assert [s["committed"] for s in exact.steps] == [s["committed"] for s in plain.steps]
    assert exact.row_layers <= plain.row_layers, "layer 0 of what holds the same token is spared"


@pytest.mark.parametrize("granularity", [1, 8])
def test_a_huge_tolerance_costs_the_floor(granularity: int) -> None:
    result = run(random_llada(), tolerance=EVERYTHING, threshold=0.3, granularity=granularity)
    sizes = windows_and_commits(result, WINDOW)
    floor = LENGTH * LAYERS + LAYERS * sum(window + committed for window, committed in sizes)
    assert result.row_layers == result.work.floor == floor
    assert result.work.refreshed == 0
    assert result.work.committed == LAYERS * sum(committed for _, committed in sizes)


@pytest.mark.parametrize("reach", [0, 1, 3])
def test_neighbours_are_computed_in_any_case(reach: int) -> None:
    result = run(random_llada(), tolerance=EVERYTHING, tokens_per_step=2, reach=reach)
    masked, expected = set(range(len(PROMPT), LENGTH)), 0
    for step in result.steps[:-1]:
        masked -= set(step["committed"])
        near = {p for c in step["committed"] for p in range(c - reach, c + reach + 1)}
        expected += len(
            near & set(range(LENGTH)) - set(step["committed"]) - set(sorted(masked)[:WINDOW])
        )
    assert result.work.neighbours == LAYERS * expected
    assert result.row_layers == result.work.floor + result.work.neighbours
    assert (expected > 0) == (reach > 0)


@pytest.mark.parametrize("reach", [0, 2])
def test_parts_add_up(reach: int) -> None:
    for mandatory in ("window", "committed"):
        knobs = {"tolerance": 0.05, "mandatory": mandatory, "tokens_per_step": 1, "reach": reach}
        result = run(random_llada(1), **knobs)
        *parts, floor = astuple(result.work)
        assert sum(parts) == result.row_layers
        assert result.work.refreshed > 0
        sizes = windows_and_commits(result, WINDOW)
        assert floor == LENGTH * LAYERS + LAYERS * sum(w + c for w, c in sizes)
        if mandatory == "window":
            assert result.row_layers == floor + result.work.neighbours + result.work.refreshed


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("seed", range(3))
def test_work_falls_with_the_tolerance(seed: int, granularity: int) -> None:
    work = [
        run(random_llada(seed), tokens_per_step=1, tolerance=t, granularity=granularity).row_layers
        for t in (0.0, 0.02, 0.1, 0.5, EVERYTHING)
    ]
    assert work == sorted(work, reverse=True) and work[0] > work[-1]


def test_blocks_are_dearer_than_positions() -> None:
    work = [
        run(random_llada(2), tokens_per_step=1, tolerance=0.05, granularity=size).row_layers
        for size in (1, 8, 16)
    ]
    assert work == sorted(work) and work[0] < work[-1]


def test_a_selective_window_costs_less_than_the_floor() -> None:
    """Without refreshes: window rows whose predictions hold are left alone, others are not."""
    knobs: dict[str, Any] = {"tolerance": EVERYTHING, "mandatory": "committed"}
    work = [
        run(random_llada(), tokens_per_step=1, prediction_drift=d, **knobs).row_layers
        for d in (0.0, 0.3, EVERYTHING)
    ]
    floor = run(random_llada(), tokens_per_step=1, tolerance=EVERYTHING).row_layers
    assert floor >= work[0] > work[1] > work[2]
    assert work[2] == LENGTH * LAYERS + (MAX_TOKENS - 1) * LAYERS, "just committed rows alone"


def test_every_step_leaves_the_tolerance_at_most() -> None:
    """What a step does not compute adds up to ``tolerance`` at most, by its own shadow pass."""
    model, options = random_llada(3), IdealOptions(window=WINDOW, tolerance=0.05, tokens_per_step=1)
    canvas, shadow = Canvas(model, PROMPT, MAX_TOKENS), ShadowPasses(model)
    decoder = Ideal(model, canvas, options, shadow)
    assert decoder.step()
    while len(window := canvas.window(WINDOW)):
        truth = shadow.of(canvas, window)
        cost = relative_drift(truth.states[:-1], decoder.cache.hidden) * truth.attention
        left = decoder.joins(window) == LAYERS
        assert float(cost.max(dim=0).values[left].sum()) <= 0.05 + 1e-6
        assert decoder.step()


def test_rows_join_from_what_is_stored() -> None:
    """A late row's input is the stored one, and below its join layer nothing is written."""
    model = random_llada(4)
    canvas = Canvas(model, PROMPT, MAX_TOKENS)
    decoder = Ideal(model, canvas, IdealOptions(window=WINDOW), ShadowPasses(model))
    assert decoder.step()
    decoder.cache.hidden[2, 6] += 1.0
    before = decoder.cache.hidden.clone()
    join = torch.full((LENGTH,), LAYERS)
    join[6], join[9] = 2, 0
    decoder.run(join)
    changed = (decoder.cache.hidden != before).any(dim=-1)  # (L, T)
    assert changed[:, [p for p in range(LENGTH) if p not in (6, 9)]].sum() == 0
    assert changed[:, 6].tolist() == [False, False, False, True]
    assert torch.equal(decoder.cache.hidden[2, 6], before[2, 6])
    k = model.project(2, before[2, [6]], torch.tensor([6]))[1]
    torch.testing.assert_close(decoder.cache.keys[2][:, [6]], k)


def test_without_cache_is_decode() -> None:
    model = random_llada(5, eos=28)
    options = DecodingOptions(window=WINDOW, threshold=0.3)
    shadow = ShadowPasses(model, keep=2)  # fewer than there are steps
    assert without_cache(model, PROMPT, MAX_TOKENS, options, shadow) == decode(
        model, PROMPT, MAX_TOKENS, options
    )


def test_last_good_layer() -> None:
    drift = torch.tensor(
        [[0.0, 0.9, 0.0, 0.0], [0.05, 0.9, 0.0, 0.5], [0.2, 0.9, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0]]
    )
    assert last_good_layer(drift, slack=0.1).tolist() == [1, 0, 0, 0]
    assert last_good_layer(drift, slack=0.0).tolist() == [0, 0, 0, 0]
    assert last_good_layer(drift, slack=0.3).tolist() == [2, 0, 0, 0]


def test_costliest_stops_at_the_tolerance() -> None:
    cost, price = torch.tensor([0.1, 0.4, 0.0, 0.3]), torch.tensor([1, 1, 1, 1])
    assert costliest(cost, price, 0.9).tolist() == []
    assert costliest(cost, price, 0.5).tolist() == [1]
    assert costliest(cost, price, 0.0).tolist() == [1, 3, 0]
    assert costliest(cost, torch.tensor([1, 8, 1, 1]), 0.55).tolist() == [3], "cheap, and enough"


def test_a_block_is_refreshed_whole_but_for_what_is_computed_anyway() -> None:
    drift = torch.zeros(3, 8)
    drift[2, 1] = 1.0  # one position of the first block
    attention = torch.full((3, 8), 1 / 8)
    free = torch.ones(8, dtype=torch.bool)
    free[0] = False
    of_blocks = refreshed_joins(drift, attention, free, IdealOptions(granularity=4, tolerance=0.1))
    assert of_blocks.tolist() == [3, 1, 1, 1, 3, 3, 3, 3]
    of_positions = refreshed_joins(drift, attention, free, IdealOptions(tolerance=0.1))
    assert of_positions.tolist() == [3, 1, 3, 3, 3, 3, 3, 3]


@pytest.mark.parametrize(
    "knobs",
    [{"tolerance": -1}, {"slack": -0.1}, {"granularity": 0}, {"reach": -1}, {"mandatory": "none"}],
)
def test_knobs_out_of_range(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(knobs))):
        IdealOptions(**knobs)


def test_command_line_to_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Words:
        """A tokenizer of numbers."""

        @classmethod
        def from_pretrained(cls, directory: Path) -> Words:
            return cls()

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, token_ids: list[int]) -> str:
            return " ".join(map(str, token_ids))

    monkeypatch.setattr(study, "AutoTokenizer", Words)
    model = random_llada()
    model.save_pretrained(tmp_path)
    answer = decode(model, PROMPT, 12, DecodingOptions(window=WINDOW)).token_ids
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        json.dumps({"prompt": " ".join(map(str, PROMPT)), "answer": " ".join(map(str, answer))})
        + "\n"
        + json.dumps({"prompt_token_ids": [7, 7], "answer": "wrong", "max_tokens": 10})
        + "\n"
        + json.dumps({"prompt": "not read", "answer": ""})
    )
    out = tmp_path / "rows.json"
    words = ["--model", str(tmp_path), "--prompts", str(prompts), "--count", "2"]
    words += ["--window", str(WINDOW), "--tolerances", "0", "1e9", "--granularity", "1", "4"]
    words += ["--mandatory", "window", "committed", "--slack", "0", "--max-tokens", "12"]
    args = study.make_parser().parse_args([*words, "--json", str(out)])
    study.main(args)
    rows = json.loads(out.read_text())
    assert [row["setting"] for row in rows] == ["none", *study.settings_of(args)]
    assert len(rows) == 1 + 2 * 2 * 2
    assert capsys.readouterr().out.count("\n") == 2 + len(rows)
    by_name = {row["setting"]: row for row in rows}
    assert rows[0]["accuracy"] == 0.5 and rows[0]["work"] == 1.0
    exact = by_name["window, granularity 1, reach 0, tolerance 0"]
    assert exact["agreement"] == 1.0 and exact["accuracy"] == 0.5
    for row in rows[1:]:
        parts = [row[part] for part in study.PARTS if part != "floor"]
        assert sum(parts) == pytest.approx(row["work"])
