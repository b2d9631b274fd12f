# SPDX-License-Identifier: Apache-2.0
"""A LLaDA-V of random weights: its images against transformers', its decoding against the oracle.

float32. The other path is ``tests/tiny_llada_v.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.documented_commands import ROOT, blocks
from tests.tiny_llada_v import (
    END,
    GRIDS,
    IMAGE,
    NEVER,
    START,
    TURN,
    WORDS,
    TinyLLaDAV,
    picture,
)
from vllm_elastic.reference.llada import HEAD

from .agreement import agrees
from .conftest import Served, make_engine
from .driver import Driver, assert_nothing_left
from .test_oracle import CONFIGS, ask_oracle

pytestmark = pytest.mark.engine

SIZES = [(56, 56), (20, 20), (100, 60), (60, 100), (168, 168), (400, 90), (31, 200), (333, 334)]
"""Width and height: one tile, smaller than one, wide, high, shrunk or not, odd."""


@dataclass
class Problem:
    """A prompt with ``IMAGE`` where each image goes."""

    prompt: list[int]
    images: list[Image.Image]
    max_tokens: int

    def request(self, config: dict[str, Any], **more: Any) -> dict[str, Any]:
        asked = {"prompt_token_ids": self.prompt, "max_tokens": self.max_tokens, **more}
        if self.images:
            asked["multi_modal_data"] = {"image": self.images}
        return asked | {f"elastic_{key}": value for key, value in config.items()}


def words(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (count,), generator=generator).tolist()


def problems() -> list[Problem]:
    """Images at the start, in the middle, over borders of KV blocks, several, the same twice."""
    return [
        Problem([IMAGE, *words(3, 1)], [picture(100, 60)], 7),
        Problem([*words(29, 2), IMAGE, *words(5, 3)], [picture(20, 20, 1)], 16),
        Problem([*words(2, 4), IMAGE, 3, IMAGE], [picture(50, 80, 2), picture(90, 20, 3)], 20),
        Problem([5, IMAGE, *words(40, 5)], [picture(30, 200, 4)], 33),
        Problem(words(24, 6), [], 12),
        Problem([IMAGE, 1, IMAGE, IMAGE, 2], [picture(40, 40, 5)] * 2 + [picture(9, 70, 6)], 9),
    ]


@dataclass
class Tiny:
    """The model in the engine and by the other path."""

    model: TinyLLaDAV
    engine: Any
    directory: Path

    def expected(self, problem: Problem, config: dict[str, Any]) -> Any:
        features = [self.model.features(i, len(problem.images)) for i in problem.images]
        oracle, prompt = self.model.oracle, problem.prompt
        if features:
            oracle, prompt = self.model.seeing(problem.prompt, features)
        served = Served("llada-v", self.directory, oracle, self.engine)
        return ask_oracle(served, prompt, problem.max_tokens, {**config, "never": NEVER})

    def compare(self, cases: list[tuple[Problem, str]], results: list[dict[str, Any]]) -> None:
        equal = [
            agrees(result, self.expected(problem, CONFIGS[name]), name)
            for (problem, name), result in zip(cases, results, strict=True)
        ]
        assert equal.count(False) <= len(cases) / 100


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    directory = tmp_path_factory.mktemp("llada_v")
    model = TinyLLaDAV()
    model.save(directory)
    yield Tiny(model, make_engine(directory, enable_mm_embeds=True), directory)


def made_of(engine: Any, images: list[Image.Image]) -> tuple[list[int], list[torch.Tensor]]:
    """The prompt that vLLM's pipeline makes of some images, and the rows they become."""
    rendered = engine.llm.llm_engine.renderer.render_cmpl(
        [{"prompt_token_ids": [IMAGE] * len(images), "multi_modal_data": {"image": images}}]
    )[0]
    model = engine.runner.model
    with torch.inference_mode():
        rows = [
            model.embed_multimodal(**item.get_data()).cpu()
            for item in rendered["mm_kwargs"]["image"]
        ]
    return rendered["prompt_token_ids"], rows


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_features_are_transformers(size: tuple[int, int], tiny: Tiny) -> None:
    image = picture(*size, seed=7)
    prompt, (rows,) = made_of(tiny.engine, [image])
    expected = tiny.model.features(image)
    assert prompt == [IMAGE] * len(expected)
    torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


def test_features_of_several_are_transformers(tiny: Tiny) -> None:
    """Padded to squares, one tile each; and an image alone is not the same image in company."""
    images = [picture(*size, seed=8) for size in SIZES]
    prompt, rows = made_of(tiny.engine, images)
    assert len(prompt) == sum(map(len, rows))
    for image, own in zip(images, rows, strict=True):
        torch.testing.assert_close(own, tiny.model.features(image, 2), atol=1e-5, rtol=1e-5)
    assert len(made_of(tiny.engine, images[:1])[1][0]) != len(rows[0])


def test_modes_of_images(tiny: Tiny) -> None:
    """What is not RGB becomes it before anything else."""
    for mode in ("L", "RGBA", "P"):
        image = picture(70, 50).convert(mode)
        _, (rows,) = made_of(tiny.engine, [image])
        expected = tiny.model.features(image.convert("RGB"))
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_batch_of_16_equals_oracle(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy, with images and without in one batch."""
    run, kinds = tiny.engine.runner.run, set()

    def seen(plans: list[Any]) -> Any:
        for plan in plans:
            first = plan.segments[0]
            if first.join_layer == 0 and np.isin(first.positions, plan.stored_inputs).any():
                kinds.add(plan.kind)
        return run(plans)

    monkeypatch.setattr(tiny.engine.runner, "run", seen)
    cases = list(itertools.product(problems(), CONFIGS))
    results = tiny.engine.run([problem.request(CONFIGS[name]) for problem, name in cases])
    tiny.compare(cases, results)
    # Positions of an image start from their stored input in passes of every kind: tracked ones,
    # probes and neighbours in windows, all of them in full passes.
    assert kinds >= {"first", "full", "window", "refresh"}, "images had no rows at layer 0 in some"


def test_batch_of_1_equals_oracle(tiny: Tiny) -> None:
    cases = [
        (problem, name)
        for i, problem in enumerate(problems())
        for j, name in enumerate(CONFIGS)
        if (i + j) % 4 == 0
    ]
    scheduler = tiny.engine.scheduler
    limit, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 1
    try:
        results = tiny.engine.run([problem.request(CONFIGS[name]) for problem, name in cases])
    finally:
        scheduler.max_num_active_reqs = limit
    tiny.compare(cases, results)


def test_features_in_place_of_images(tiny: Tiny) -> None:
    """Rows that a client sends (``--enable-mm-embeds``): no tower takes part."""
    generator = torch.Generator().manual_seed(9)
    rows = [torch.randn(count, 128, generator=generator) for count in (37, 3)]
    prompt = [*words(4, 7), IMAGE, 8, IMAGE, 9]
    oracle, seen = tiny.model.seeing(prompt, rows)
    served = Served("llada-v", tiny.directory, oracle, tiny.engine)
    for name in ("none", "released-low", "block", "dual-cache"):
        config = CONFIGS[name]
        problem = Problem(prompt, [], 15)
        request = problem.request(config, multi_modal_data={"image": rows})
        expected = ask_oracle(served, seen, 15, {**config, "never": NEVER})
        (result,) = tiny.engine.run([request])
        assert agrees(result, expected, name)


def test_encoded_once_a_request(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    model, encoded = tiny.engine.runner.model, []
    embed = model.embed_multimodal
    monkeypatch.setattr(
        model, "embed_multimodal", lambda **data: encoded.append(data) or embed(**data)
    )
    asked = problems()
    tiny.engine.run([problem.request({"policy": "none"}) for problem in asked])
    assert len(encoded) == sum(len(problem.images) for problem in asked) == 8


def test_banned_tokens(tiny: Tiny, tmp_path: Path) -> None:
    """A model that likes nothing better is kept from them, and ends at the end of turn."""
    model = TinyLLaDAV()
    head = model.oracle.weights[HEAD]
    for token_id in (START, END):
        head[token_id] *= 4
    head[TURN] *= 2
    model.save(tmp_path)
    eager = Tiny(model, make_engine(tmp_path), tmp_path)
    cases = [(problem, name) for problem in problems() for name in ("none", "released-high")]
    results = eager.engine.run([problem.request(CONFIGS[name]) for problem, name in cases])
    eager.compare(cases, results)
    said = {token for result in results for token in result["token_ids"]}
    assert not said & set(NEVER)
    lengths = [
        (len(result["token_ids"]), problem.max_tokens)
        for (problem, _), result in zip(cases, results, strict=True)
    ]
    assert any(length < asked for length, asked in lengths), "none ended at the end of turn"


@pytest.mark.parametrize(
    "options",
    [
        {"row_budget": 40},
        {"elastic_config": {"hidden_stride": 2}},
    ],
    ids=["chunks", "stride"],
)
@pytest.mark.slow
def test_rows_in_chunks_and_fewer_stores_equal_oracle(options: dict[str, Any], tiny: Tiny) -> None:
    """First passes of more rows than a step may have; inputs of every second layer only."""
    engine = make_engine(tiny.directory, **options)
    other = Tiny(tiny.model, engine, tiny.directory)
    stride = options.get("elastic_config", {})
    names = ["none", "released-low", "block", "interval"]
    cases = [(problem, name) for problem in problems() for name in names]
    results = engine.run([problem.request(CONFIGS[name]) for problem, name in cases])
    equal = [
        agrees(result, other.expected(problem, {**CONFIGS[name], **stride_of(name, stride)}), name)
        for (problem, name), result in zip(cases, results, strict=True)
    ]
    assert equal.count(False) <= 1


def stride_of(name: str, stride: dict[str, Any]) -> dict[str, Any]:
    """The oracle's option, of those decoders that have it."""
    return stride if CONFIGS[name]["policy"].startswith("elastic") else {}


def test_blocks_taken_away_and_given_back(tiny: Tiny) -> None:
    """A preempted request's images are encoded anew; an aborted one's leave nothing behind."""
    driver = Driver(Served("llada-v", tiny.directory, tiny.model.oracle, tiny.engine))
    asked = problems()
    expected = [tiny.expected(problem, {"policy": "none"}) for problem in asked]
    for stop_after in (0, 1, 3):
        kept = [add(driver, problem) for problem in asked]
        gone = [add(driver, problem) for problem in asked]
        for number in range(stop_after + 4):
            driver.step()
            if number == stop_after:
                driver.llm_engine.abort_request(gone)
                driver.llm_engine.reset_prefix_cache(reset_running_requests=True)
        driver.run()
        for name, wanted in zip(kept, expected, strict=True):
            assert [t for t in driver.tokens[name] if t != TURN] == wanted.token_ids
        assert_nothing_left(driver)


def add(driver: Driver, problem: Problem) -> str:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    name = f"seeing{id(driver)}x{driver.count}"
    driver.count += 1
    driver.tokens[name] = []
    params = SamplingParams(
        max_tokens=problem.max_tokens,
        temperature=0,
        detokenize=False,
        extra_args={"elastic_policy": "none"},
        output_kind=RequestOutputKind.DELTA,
    )
    prompt: dict[str, Any] = {"prompt_token_ids": problem.prompt}
    if problem.images:
        prompt["multi_modal_data"] = {"image": problem.images}
    driver.llm_engine.add_request(name, prompt, params)
    return name


def test_prompts_of_text(tiny: Tiny) -> None:
    """``<image>`` in a text, and a chat's parts in the order in which they stand."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=3, temperature=0)
    images = [picture(30, 40), picture(80, 50)]
    text = {"prompt": "w1 <image> w2 <image>\nw3", "multi_modal_data": {"image": images}}
    (answer,) = tiny.engine.llm.generate([text], params, use_tqdm=False)
    several = [IMAGE] * 17  # a tile of 16 patches, and a newline
    assert answer.prompt_token_ids == [1, *several, 2, *several, 3]
    parts = [
        {"type": "text", "text": " w1 "},
        {"type": "image_pil", "image_pil": images[0]},
        {"type": "image_pil", "image_pil": images[1]},
        {"type": "text", "text": "w2"},
    ]
    messages = [{"role": "system", "content": "w5"}, {"role": "user", "content": parts}]
    (answer,) = tiny.engine.llm.chat(messages, params, use_tqdm=False)
    assert answer.prompt == (
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nw5<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nw1\n<image> <image>\nw2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    at = answer.prompt_token_ids.index(IMAGE)
    assert answer.prompt_token_ids[at - 1 : at + 36] == [1, *several, *several, 2, TURN]
    (answer,) = tiny.engine.llm.chat([{"role": "user", "content": "w1"}], params, use_tqdm=False)
    assert answer.prompt.startswith(
        "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language "
        "and vision assistant."
    )


def test_profiling_encodes_the_largest_image(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU sizes its cache by it: more tiles than any image has."""
    model, seen = tiny.engine.runner.model, []
    embed = model.embed_multimodal
    monkeypatch.setattr(
        model, "embed_multimodal", lambda **data: seen.append(data["pixel_values"]) or embed(**data)
    )
    tiny.engine.runner.profile_run()
    assert [len(tiles) for tiles in seen] == [1 + GRIDS**2]


def test_a_checkpoint_without_its_tower(tiny: Tiny, tmp_path: Path) -> None:
    """vLLM would serve it with what the memory held."""
    from safetensors.torch import load_file, save_file

    from vllm_elastic.bench.engine import BenchEngine

    for file in tiny.directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tiny.directory / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "vision_tower" not in name}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"nothing for \d+ weights of LLaDA-V's images, .*left out"
    ):
        BenchEngine(tmp_path, kv_cache_memory_bytes=64 << 20)


def test_documented_calls(tiny: Tiny) -> None:
    """The Python block of docs/images.md."""
    from vllm import SamplingParams

    (block,) = (b for b in blocks([ROOT / "docs" / "images.md"]) if b.language == "python")
    answers: list[Any] = []

    def kept(method: Any) -> Any:
        return lambda *args: answers.extend(method(*args, use_tqdm=False))

    llm = tiny.engine.llm
    names = {
        "llm": SimpleNamespace(generate=kept(llm.generate), chat=kept(llm.chat)),
        "params": SamplingParams(temperature=0.0, max_tokens=4),
        "picture": picture(40, 30, 9),
    }
    exec(block.text, names)
    assert [len(answer.outputs[0].token_ids) > 0 for answer in answers] == [True, True]
    assert all(IMAGE in answer.prompt_token_ids for answer in answers)
