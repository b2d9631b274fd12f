# SPDX-License-Identifier: Apache-2.0
"""The study of drift: which positions are counted where, and a whole run on a random model."""

from __future__ import annotations

import drift
import pytest
import torch

from vllm_elastic.reference import LLaDA, LLaDAConfig

NEVER = torch.iinfo(torch.int64).max
# Four prompt tokens, answers of steps 0, 5 and 5, and five masks, two of them in the window.
COMMITTED_AT = torch.tensor([-1, -1, -1, -1, 0, 5, NEVER, 5, NEVER, NEVER, NEVER, NEVER])
WINDOW = torch.tensor([6, 8])


def test_regions_part_the_canvas() -> None:
    regions = drift.regions_of(COMMITTED_AT, 4, WINDOW, step=6)
    assert torch.stack(list(regions.values())).sum(dim=0).eq(1).all()
    assert regions["just committed"].nonzero().flatten().tolist() == [5, 7]
    assert regions["recent answer"].nonzero().flatten().tolist() == [4]
    assert regions["tail"].nonzero().flatten().tolist() == [9, 10, 11]
    assert drift.regions_of(COMMITTED_AT, 4, WINDOW, 20)["settled answer"][4]


def test_distances_from_commits() -> None:
    near = drift.distances_of(COMMITTED_AT, WINDOW, step=6)
    assert near[1].nonzero().flatten().tolist() == [4]  # 6 and 8 are computed anyway
    assert near[2].nonzero().flatten().tolist() == [3, 9]
    assert near[4].nonzero().flatten().tolist() == [1, 2, 10, 11]
    assert near[8].nonzero().flatten().tolist() == [0]


def test_prompts_input_never_changes_in_layer_0() -> None:
    """And does above it: everything is recomputed at every step."""
    config = LLaDAConfig(
        d_model=32,
        n_heads=2,
        n_kv_heads=2,
        n_layers=3,
        mlp_hidden_size=48,
        vocab_size=50,
        embedding_size=50,
        max_sequence_length=64,
        rope_theta=1e4,
        rms_norm_eps=1e-5,
        weight_tying=False,
        mask_token_id=49,
        eos_token_id=None,
    )
    words = ["--model", "m", "--prompts", "p", "--max-tokens", "9", "--window", "4"]
    args = drift.make_parser().parse_args([*words, "--ages", "1", "2"])
    values = list(drift.measure(LLaDA.random(config, seed=1), [3, 1, 4], args))
    prompt = [(key, value) for key, value in values if key[:2] == ("drift", "prompt")]
    assert {key[2] for key, _ in prompt} == {1, 2}
    assert all((value == 0) == (key[3] == 0) for key, value in prompt)
    attention = [(key, value) for key, value in values if key[0] == "attention"]
    by_layer = [sum(value for key, value in attention if key[3] == layer) for layer in range(3)]
    assert by_layer == pytest.approx([by_layer[0]] * 3)  # every step's rows sum to 1
    assert by_layer[0] == pytest.approx(round(by_layer[0]))
