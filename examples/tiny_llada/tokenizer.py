"""Builds the tokenizer: one token a word, number or sign, LLaDA's special tokens, a chat template.

`python tokenizer.py FOLDER` writes `tokenizer.json` and `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tasks import MOVES, SETTINGS
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from words import WORDS

START, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, TURN_END = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
UNKNOWN = "<unk>"
MAX_LENGTH = 2048
SPECIAL = (EOS, MASK, START, HEADER, HEADER_END, TURN_END, UNKNOWN)
SIGNS = [".", ":", "?", ",", ";", ">", "<", "+", "-", "=", "####", "(", ")", "!", "*"]
PROSE = """
    user assistant system start Running total modulo Sort Walk Go From from the road leads to
""".split()  # noqa: SIM905

LATE = ("Table", "Read")  # added during training, so that no id changed

CHAT_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Token to id: special tokens, 0..99, signs, the words of the questions, the labels."""
    settings = " ".join(" ".join(setting).replace("{}", " ") for setting in SETTINGS).split()
    numbers = [str(number) for number in range(100)]
    entries = dict.fromkeys([*SPECIAL, *numbers, *SIGNS, *PROSE, *MOVES, *settings, *WORDS, *LATE])
    return {token: index for index, token in enumerate(entries)}


def build() -> PreTrainedTokenizerFast:
    """A fast tokenizer with `vocabulary()`."""
    return tokenizer_of(vocabulary(), settings())


def tokenizer_of(ids: dict[str, int], own: dict[str, Any]) -> PreTrainedTokenizerFast:
    """With these tokens and settings; it adds no special tokens of its own accord."""
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words = pre_tokenizers.Split(Regex(r"\w+|####|[^\w\s]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **own)


def settings() -> dict[str, Any]:
    """What `tokenizer_config.json` says besides the class."""
    return {
        "bos_token": START,
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "unk_token": UNKNOWN,
        "additional_special_tokens": [HEADER, HEADER_END, TURN_END],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": MAX_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }


def save(folder: Path) -> None:
    """Write both files."""
    write(folder, vocabulary(), settings())


def write(folder: Path, ids: dict[str, int], own: dict[str, Any]) -> None:
    """`tokenizer_of` as two files, in the form that every Transformers since 4.40 reads."""
    tokenizer_of(ids, own).backend_tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **own}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    save(Path(sys.argv[1]))
