# SPDX-License-Identifier: Apache-2.0
"""The trained LLaDA-V in float32: what the engine decodes against the model as it was trained.

Pictures go through the training's own tower, the decoding through the oracle.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.reference.llada import EMBEDDING, HEAD

from .agreement import agrees
from .conftest import Served, make_engine
from .test_oracle import ask_oracle

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_llada_v"
CHECKPOINT = FOLDER / "checkpoint"
sys.path.insert(0, str(FOLDER))

pytestmark = pytest.mark.engine

CONFIGS: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "dual-cache": {"policy": "dual-cache"},
    "interval": {"policy": "interval"},
    "released": {"policy": "elastic", "gamma": 0.9},
    "block": {"policy": "elastic-block"},
}
CANVAS = 64
"""Shorter than most answers, to keep the oracle's part short."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    yield make_engine(CHECKPOINT)


@pytest.fixture(scope="module")
def trained() -> Any:
    import seeing

    return seeing.load(CHECKPOINT)


def test_pictures_become_what_the_training_made_of_them(engine: Any, trained: Any) -> None:
    import seeing
    from questions import problems

    (problem,) = problems(3, 1)
    token = trained.image_token
    rendered = engine.llm.llm_engine.renderer.render_cmpl(
        [{"prompt_token_ids": [token], "multi_modal_data": {"image": [problem.image]}}]
    )[0]
    (item,) = rendered["mm_kwargs"]["image"]
    made = item.get_data()
    tile = seeing.tile(problem.image, trained.tower_shape.image_size)
    torch.testing.assert_close(made["pixel_values"], torch.stack([tile, tile]))
    with torch.inference_mode():
        rows = engine.runner.model.embed_multimodal(**made)
        expected = trained.on_canvas(trained.rows(tile[None]))[0]
    assert rendered["prompt_token_ids"] == [token] * trained.positions
    # Rows have norms of hundreds: a layer 0 is in them.
    torch.testing.assert_close(rows, expected, atol=1e-3, rtol=1e-5)


def knowing(trained: Any, tile: torch.Tensor) -> tuple[LLaDA, list[int]]:
    """The oracle that knows a picture's positions as tokens behind its vocabulary, and those."""
    shape = trained.shape
    with torch.inference_mode():
        rows = trained.on_canvas(trained.rows(tile[None]))[0]
    weights = dict(trained.language.state_dict())
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], rows])
    weights[HEAD] = torch.cat([weights[HEAD], torch.zeros_like(rows)])
    from lessons import MASK, TURN_END

    size = shape.embedding_size + len(rows)
    config = LLaDAConfig(
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_heads,
        n_layers=shape.n_layers,
        mlp_hidden_size=shape.mlp_hidden_size,
        vocab_size=shape.vocab_size,
        embedding_size=size,
        max_sequence_length=shape.max_sequence_length,
        rope_theta=shape.rope_theta,
        rms_norm_eps=shape.rms_norm_eps,
        weight_tying=False,
        mask_token_id=MASK,
        eos_token_id=TURN_END,
    )
    return LLaDA(config, weights), list(range(shape.embedding_size, size))


def test_equals_the_training_model_decoded_by_the_oracle(engine: Any, trained: Any) -> None:
    import seeing
    from lessons import VOCABULARY, prompt_ids
    from questions import QUESTIONS, problems
    from vocabulary import NEVER_CHOSEN

    never = tuple(VOCABULARY[token] for token in NEVER_CHOSEN)
    cases, requests = [], []
    for index, problem in enumerate(problems(11, len(QUESTIONS))):
        # Each question under two policies.
        for name in (list(CONFIGS) * 2)[index : index + 2]:
            prompt = prompt_ids(problem.question, 1)
            cases.append((problem, name))
            requests.append(
                {
                    "prompt_token_ids": prompt,
                    "multi_modal_data": {"image": [problem.image]},
                    "max_tokens": CANVAS,
                    **{f"elastic_{key}": value for key, value in CONFIGS[name].items()},
                }
            )
    equal, lengths = [], []
    for (problem, name), result in zip(cases, engine.run(requests), strict=True):
        tile = seeing.tile(problem.image, trained.tower_shape.image_size)
        oracle, rows = knowing(trained, tile)
        ids = prompt_ids(problem.question, len(rows))
        seen = iter(rows)
        written = [next(seen) if token == trained.image_token else token for token in ids]
        with torch.inference_mode():
            logits = trained(torch.tensor([ids]), tile[None])[0]
            known = oracle.head(oracle.forward(torch.tensor(written)))
        torch.testing.assert_close(logits[:, : known.shape[1]], known, atol=1e-3, rtol=1e-4)
        served = Served("tiny-llada-v", CHECKPOINT, oracle, engine)
        expected = ask_oracle(served, written, CANVAS, {**CONFIGS[name], "never": never})
        equal.append(agrees(result, expected, (name, problem.kind)))
        lengths.append(len(expected.token_ids))
    assert equal.count(False) <= len(equal) / 8
    assert max(lengths) > 30, "the model answers nothing: this test shows little"
