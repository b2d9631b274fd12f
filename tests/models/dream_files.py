# SPDX-License-Identifier: Apache-2.0
"""The small files of a Dream checkpoint, with a vocabulary of a few merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.qwen2_oracle import small_config

SPECIAL = {
    "<|endoftext|>": 262,
    "<|im_start|>": 263,
    "<|im_end|>": 264,
    "<|beginoftext|>": 265,
    "<|mask|>": 266,
    "<|dlm_pad|>": 267,
}
MERGES = ["l o", "lo w", "Ġ low", "e r", "Ġ e", "Ã ©"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in the order of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + i) for i in range(len(others)))]


def vocabulary() -> dict[str, int]:
    merged = [pair.replace(" ", "") for pair in MERGES]
    return {token: i for i, token in enumerate([*byte_symbols(), *merged])}


def write_dream_files(directory: Path, **config: Any) -> None:
    """config.json, generation_config.json and the tokenizer's files, as Dream's repositories have
    them: remote code is named, and there is no tokenizer.json."""
    ids = {"mask_token_id": 266, "eos_token_id": 262, "pad_token_id": 262, "bos_token_id": 262}
    added = {
        str(token_id): {
            **{"content": token, "lstrip": False, "normalized": False, "rstrip": False},
            **{"single_word": False, "special": True},
        }
        for token, token_id in SPECIAL.items()
    }
    files: dict[str, Any] = {
        "config.json": small_config(**ids, **config),
        "generation_config.json": {"eos_token_id": 262, "mask_token_id": None, "alg": "origin"},
        "vocab.json": vocabulary(),
        "added_tokens.json": SPECIAL,
        "tokenizer_config.json": {
            "added_tokens_decoder": added,
            "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
            "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
            "bos_token": "<|beginoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "errors": "replace",
            "mask_token": "<|mask|>",
            "model_max_length": 131072,
            "pad_token": "<|dlm_pad|>",
            "split_special_tokens": False,
            "tokenizer_class": "DreamTokenizer",
            "unk_token": "<|endoftext|>",
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
