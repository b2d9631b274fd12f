# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer from its own files, and where its answers end; no remote code is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .dream_files import SPECIAL, vocabulary, write_dream_files


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    directory = tmp_path_factory.mktemp("dream_files")
    write_dream_files(directory)
    return EngineArgs(model=str(directory), dtype="float32").create_engine_config()


@pytest.fixture(scope="module")
def tokenizer(vllm_config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(vllm_config.model_config)


V = vocabulary() | SPECIAL


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("low lower", ["low", "Ġlow", "er"]),
        ("  low", ["Ġ", "Ġlow"]),  # Qwen2's pattern leaves one space to the word
        ("1024", ["1", "0", "2", "4"]),  # its digits are single
        ("e\u0301", ["Ã©"]),  # NFC
        ("a<|mask|>b<|im_end|>\n", ["a", "<|mask|>", "b", "<|im_end|>", "Ċ"]),
        ("<|beginoftext|>low", ["<|beginoftext|>", "low"]),
        ("", []),
    ],
)
def test_ids_by_hand(tokenizer: Any, text: str, tokens: list[str]) -> None:
    """No bos is added by itself."""
    assert tokenizer.encode(text) == [V[token] for token in tokens]
    if "\u0301" not in text:
        assert tokenizer.decode([V[token] for token in tokens]) == text


def test_it_is_a_fast_one_with_the_files_special_tokens(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (262, 267)
    assert (tokenizer.bos_token_id, tokenizer.mask_token_id) == (265, 266)
    assert tokenizer.decode([V["low"], 264, 262], skip_special_tokens=True) == "low"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "low"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nlow<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("params", "stops"),
    [({}, [264, 267]), ({"stop_token_ids": [7, 264]}, [7, 264, 267]), ({"ignore_eos": True}, [])],
)
def test_answers_end_at_their_turn(vllm_config: Any, params: dict[str, Any], stops: Any) -> None:
    """Dream's generation_config.json names the end of text alone; its chats end in <|im_end|>, and
    DiffuCoder pads with a token of its own."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    processor = InputProcessor(vllm_config)
    prompt = {"type": "token", "prompt_token_ids": [9, 8]}
    request = processor.process_inputs(
        "0", prompt, SamplingParams(temperature=0.0, max_tokens=4, **params), ("generate",)
    )
    assert request.sampling_params.stop_token_ids == stops
    assert request.sampling_params.eos_token_id == (None if "ignore_eos" in params else 262)


def test_ends_are_never_chosen_where_they_are_ignored(vllm_config: Any) -> None:
    from vllm_elastic.models.registry import traits_of

    traits = traits_of(vllm_config.model_config.hf_config)
    assert traits.text_end_ids == (262, 264, 267)
    assert traits.never_chosen == (266,)
    assert traits.logits_shift == 1


def test_ids_that_do_not_follow_the_vocabulary_are_refused(tmp_path: Path) -> None:
    """Qwen2's class counts on from the vocabulary; another id would be another token."""
    from vllm.tokenizers import get_tokenizer

    write_dream_files(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["added_tokens_decoder"]["300"] = settings["added_tokens_decoder"].pop("266")
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"has id 26\d, and tokenizer_config.json says"):
        get_tokenizer(str(tmp_path))


def test_remote_code_of_others_is_still_asked_for(tmp_path: Path) -> None:
    """Nothing but Dream's own class is mapped."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

    from vllm_elastic.models.dream_config import DreamConfig
    from vllm_elastic.models.llada_config import LLaDAConfig

    assert AutoTokenizer is not None
    assert DreamConfig in TOKENIZER_MAPPING
    assert LLaDAConfig not in TOKENIZER_MAPPING
