# SPDX-License-Identifier: Apache-2.0
"""Room for the prompts of a command: on models whose own length takes more than there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.test_llada_8b import CONFIG
from tests.engines_kept import keep_engines
from vllm_elastic.bench import engine, served_model
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.engine import cache_bytes
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import ElasticConfig

TINY = Path(__file__).parents[2] / "examples" / "tiny_llada" / "checkpoint"
LENGTH = 1 << 17
"""Positions of the tiny LLaDA that take more than 1 GiB in bfloat16."""
POSITION = 2 * (32 * 2 * 4096 + 31 * 4096)
"""Bytes of a position of LLaDA-8B's, in bfloat16."""
ANSWER = ElasticConfig().default_max_tokens


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """The tiny LLaDA, said to be made for long canvases."""
    folder = tmp_path / "long"
    folder.mkdir()
    for file in TINY.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((TINY / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"max_sequence_length": LENGTH}))
    shape = ModelShape.of(served_model._model_config(folder, "auto").hf_config)
    assert LENGTH * (shape.keys_values_bytes() + shape.hidden_bytes(1)) > 1 << 30
    return folder


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.jsonl"
    lines = [
        {"prompt_token_ids": [7] * 20, "answer": "", "max_tokens": length} for length in (8, 16)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.engine
@pytest.mark.parametrize(
    "words",
    [
        ["run", "--prompts", "problems.jsonl", "--out", "out.jsonl"],
        ["settings", "--problems", "problems.jsonl", "--json", "out.json"],
        ["tune", "--prompts", "problems.jsonl", "--policies", "interval", "--out", "out.json"],
    ],
    ids=lambda words: words[0],
)
@pytest.mark.slow
def test_a_model_longer_than_the_cache_starts(
    words: list[str], long: Path, problems: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would refuse to start: one canvas of the model's own length is more than 1 GiB."""
    keep_engines()
    monkeypatch.chdir(problems.parent)
    args = make_parser().parse_args([words[0], "--model", str(long), *words[1:]])
    args.function(args)
    assert list(problems.parent.glob("out.*"))


@pytest.mark.engine
def test_a_batch_of_the_longest_canvas_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for fewer would serve the batch in turns, and a shorter canvas would be refused."""
    keep_engines()
    monkeypatch.setattr(engine, "DEFAULT_KV_CACHE_BYTES", 0)
    words = ["tune", "--model", str(TINY), "--prompts", "p", "--batch-size", "3"]
    requests: list[dict[str, Any]] = [
        {"prompt": "3 5 2 9", "max_tokens": 300},
        {"prompt_token_ids": [7] * 45, "max_tokens": 340},
        {"prompt": "3 5 2 9"},
        {"prompt": "3 5 2 9"},
    ]
    served = served_model.served_model(make_parser().parse_args(words), requests)
    assert served.dtype == "bfloat16", "the checkpoint's"
    assert served.runner.model_config.max_model_len == 385
    assert served.num_blocks == 3 * 13
    first, second, third, _ = (answer["canvas"] for answer in served.run(requests))
    assert (second, third) == (385, first - 300 + ANSWER)
    model = served.llm.llm_engine.vllm_config.model_config
    assert served_model.longest_canvas(model, requests[:1], ANSWER) == first


class Options:
    """What ``BenchEngine`` would be made with."""

    def __init__(self, model: Path, **options: Any) -> None:
        self.length: int = options["max_model_len"]
        self.cache: int | None = options["kv_cache_memory_bytes"]
        self.seats: int = options["batch_size"]


def asked_for(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *words: str,
    prompt: int = 1000,
    max_tokens: int | None = None,
    count: int = 20,
) -> Options:
    """Of LLaDA-8B, whose config.json is all there is of it."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.setattr(served_model, "BenchEngine", Options)
    args = make_parser().parse_args(["tune", "--model", str(folder), "--prompts", "p", *words])
    requests = [{"prompt_token_ids": [5] * prompt, "max_tokens": max_tokens}] * count
    found: Any = served_model.served_model(args, requests)
    return found


def bytes_of(canvases: int, blocks: int) -> int:
    return (canvases * blocks + 1) * 32 * POSITION


def test_room_for_sixteen_canvases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked_for(tmp_path, monkeypatch)
    assert (found.length, found.seats) == (1000 + ANSWER, 16)
    assert found.cache == bytes_of(16, -(-(1000 + ANSWER) // 32))


def test_fewer_prompts_than_a_batch_take_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked_for(tmp_path, monkeypatch, "--dtype", "float32", max_tokens=24, count=2)
    assert (found.length, found.cache) == (1024, 2 * bytes_of(2, 32))


def test_no_longer_than_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses the prompt then, by its length."""
    assert asked_for(tmp_path, monkeypatch, prompt=5000).length == 4096


def test_the_operators_own_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked_for(tmp_path, monkeypatch, "--max-model-len", "2048")
    assert (found.length, found.cache) == (2048, bytes_of(16, 64))
    found = asked_for(tmp_path, monkeypatch, "--kv-cache-memory-bytes", "3000000000")
    assert (found.length, found.cache) == (1000 + ANSWER, 3000000000)


def test_a_default_longer_than_every_canvas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start is refused whose default leaves no room for a prompt."""
    words = ["--elastic-config", '{"default_max_tokens": 2000, "hidden_stride": 16}']
    found = asked_for(tmp_path, monkeypatch, *words, max_tokens=24)
    assert found.length == 2001
    # The input of layer 16 alone is kept.
    assert found.cache == (16 * 63 + 1) * 32 * 2 * (32 * 2 * 4096 + 4096)


def test_vllm_sizes_the_cache_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "on_gpu", lambda: True)
    found = asked_for(tmp_path, monkeypatch)
    assert (found.length, found.cache) == (1000 + ANSWER, None)


def test_a_small_model_has_the_cache_that_it_had() -> None:
    assert cache_bytes(ModelShape(width=64, layers=2, heads=2, kv_heads=2), 64, 1) == 64 << 20


def test_words_for_a_model_without_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    args = make_parser().parse_args(["tune", "--model", str(tmp_path), "--prompts", "p"])
    with pytest.raises(SystemExit, match=r"--model: .* has no tokenizer\.json: write prompts as"):
        served_model.served_model(args, [{"prompt": "a"}])
