# SPDX-License-Identifier: Apache-2.0
"""What a request gets where it names nothing: from the operator, from us, from the model's file."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.engine

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint"
LOGGERS = ("vllm.vllm_elastic.engine.request_defaults", "vllm.config.model")


def make_config(model: Path = MODEL, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=str(model), dtype="float32", max_model_len=512, skip_tokenizer_init=True, **options
    )
    return args.create_engine_config()


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What ours and vLLM's log; vLLM's loggers do not propagate to pytest's."""
    make_config()  # which sets vLLM's loggers up

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
    yield lines
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(handler)


def model_with(folder: Path, **values: Any) -> Path:
    """The tiny model with a generation_config.json of these values."""
    for file in MODEL.iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "generation_config.json"
    config.unlink(missing_ok=True)
    config.write_text(json.dumps(values))
    return folder


def processor_of(model: Path, **options: Any) -> Any:
    from vllm.v1.engine.input_processor import InputProcessor

    return InputProcessor(make_config(model, **options))


def plain_request(processor: Any) -> Any:
    """The parameters of a chat request without any, after admission."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=[{"role": "user", "content": "2"}])
    defaults = processor.model_config.get_diff_sampling_param()
    params = request.to_sampling_params(256, defaults)
    prompt = {"type": "token", "prompt_token_ids": [9] * 4}
    return processor.process_inputs("0", prompt, params, ("generate",)).sampling_params


def test_models_file_does_not_make_every_request_fail(tmp_path: Path, messages: list[str]) -> None:
    model = model_with(tmp_path, repetition_penalty=1.1, top_p=0.9, do_sample=True)
    params = plain_request(processor_of(model, override_generation_config={"temperature": 0.5}))
    assert (params.repetition_penalty, params.top_p) == (1.0, 0.9)
    (line,) = [m for m in messages if "repetition_penalty" in m]
    assert line.startswith("repetition_penalty 1.1 of the model's generation_config.json is not")


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_operators_values_are_judged_at_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"--override-generation-config: {name} 1\.2 .*elastic"):
        processor_of(MODEL, override_generation_config={name: 1.2})
    folder = model_with(tmp_path, **{name: 1.2, "do_sample": True})
    with pytest.raises(ValueError, match=rf"--generation-config: {name} 1\.2 .*elastic"):
        processor_of(MODEL, generation_config=str(folder))


def test_operators_values_win(tmp_path: Path) -> None:
    model = model_with(tmp_path, temperature=0.7, max_new_tokens=99, top_k=5, do_sample=True)
    asked = {"temperature": 0.3, "top_k": 7, "repetition_penalty": 1.0}
    params = plain_request(processor_of(model, override_generation_config=asked))
    assert (params.temperature, params.top_k, params.max_tokens) == (0.3, 7, 256)
    params = plain_request(processor_of(MODEL, generation_config=str(model)))
    assert (params.temperature, params.top_k, params.max_tokens) == (0.7, 5, 99)


def test_log_says_where_each_value_comes_from(tmp_path: Path, messages: list[str]) -> None:
    """vLLM's own line would say that the model's file set temperature 0."""
    model = model_with(tmp_path, temperature=0.7, top_k=5, do_sample=True)
    processor = processor_of(model, override_generation_config={"top_p": 0.9})
    plain_request(processor)
    (line,) = [m for m in messages if "temperature" in m]
    assert line == (
        "a request that does not name them gets temperature 0.0 (vllm_elastic's default, in place "
        "of 0.7 (the model's generation_config.json)), top_k 5 (the model's "
        "generation_config.json), max_new_tokens 256 (vllm_elastic's default), top_p 0.9 "
        "(--override-generation-config)"
    )


@pytest.mark.parametrize(
    ("steps", "operators", "message"),
    [
        (60, {"max_new_tokens": 96}, ""),  # 3 blocks of 20 steps; of 256 positions it were 8
        (
            128,
            {"max_new_tokens": 96},
            "--override-generation-config: with max_new_tokens 96, .* multiple of the 3 blocks",
        ),
        (60, {}, "--elastic-config: with default_max_tokens 256, .* multiple of the 8 blocks"),
    ],
)
def test_steps_are_held_against_the_canvas_that_a_plain_request_gets(
    steps: int, operators: dict[str, Any], message: str
) -> None:
    """A start was refused for a canvas that nobody gets, or every plain request was."""
    options: dict[str, Any] = {
        "additional_config": {"elastic": {"steps": steps}},
        "override_generation_config": operators,
    }
    if message:
        with pytest.raises(ValueError, match=message):
            make_config(**options)
    else:
        assert plain_request(processor_of(MODEL, **options)).max_tokens == 96


def test_room_is_wanted_for_the_canvas_that_a_plain_request_gets(tmp_path: Path) -> None:
    """``max_model_len`` is 512."""
    too_long = {"additional_config": {"elastic": {"default_max_tokens": 600}}}
    with pytest.raises(ValueError, match="--elastic-config: default_max_tokens 600 leaves no room"):
        make_config(**too_long)
    make_config(override_generation_config={"max_new_tokens": 96}, **too_long)
    with pytest.raises(
        ValueError, match="--override-generation-config: max_new_tokens 600 leaves no room"
    ):
        make_config(override_generation_config={"max_new_tokens": 600})
    folder = model_with(tmp_path, max_new_tokens=600, do_sample=True)
    make_config(folder)  # the model's own file does not say how long a canvas is
    with pytest.raises(ValueError, match="--generation-config: max_new_tokens 600 leaves no room"):
        make_config(generation_config=str(folder))
