# SPDX-License-Identifier: Apache-2.0
"""The tiny LLaDA's tokenizer, with the words of pictures behind its own; chats with images."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pictures import COLORS, SHAPES, SQUARES
from transformers import PreTrainedTokenizerFast

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
import tokenizer as text

IMAGE = "<|reserved_token_0|>"
NEVER_CHOSEN = (text.EOS, text.START, text.HEADER, text.HEADER_END)
"""As in LLaDA-V's sampler; so an answer ends with the end of its turn."""
CHAT_TEMPLATE = (
    "{{ '<|startoftext|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] | trim }}"
    "{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""LLaDA-V's, without its system text."""
QUESTIONS = "picture row in Count Where are What is at".split()  # noqa: SIM905


def vocabulary() -> dict[str, int]:
    """Token to id: those of the tiny LLaDA, then those of pictures."""
    entries = dict.fromkeys([*text.vocabulary(), IMAGE, *SQUARES, *COLORS, *SHAPES, *QUESTIONS])
    return {token: index for index, token in enumerate(entries)}


def settings() -> dict[str, Any]:
    """What `tokenizer_config.json` says besides the class."""
    own = text.settings()
    special = [*own["additional_special_tokens"], IMAGE]
    return own | {"additional_special_tokens": special, "chat_template": CHAT_TEMPLATE}


def build() -> PreTrainedTokenizerFast:
    """A fast tokenizer with `vocabulary()`."""
    return text.tokenizer_of(vocabulary(), settings())


def save(folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    text.write(folder, vocabulary(), settings())
