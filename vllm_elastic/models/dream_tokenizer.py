# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer without remote code: Qwen2's, under the name that its checkpoints ask for."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """``vocab.json``, ``merges.txt`` and what tokenizer_config.json lists of added tokens.

    Dream's own ``tokenization_dream.py`` splits, normalises and merges as Qwen2's does; on random
    strings over a toy vocabulary the two gave the same ids. Its class is a slow one, this is not.

    Raises:
        ValueError: an added token's id is not the one that the file says; names both.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for token_id, token in (kwargs.get("added_tokens_decoder") or {}).items():
            found = self.convert_tokens_to_ids(str(token))
            if found != int(token_id):
                raise ValueError(
                    f"Dream tokenizer: {str(token)!r} has id {found}, and tokenizer_config.json "
                    f"says {token_id}: added tokens must follow the vocabulary without gaps."
                )
