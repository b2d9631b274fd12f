# SPDX-License-Identifier: Apache-2.0
"""Dream's tokenizer without remote code: Qwen2's, under the name that its checkpoints ask for."""

from __future__ import annotations

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """``vocab.json``, ``merges.txt`` and what tokenizer_config.json lists of added tokens.

    Dream's own ``tokenization_dream.py`` splits, normalises and merges as Qwen2's does; on random
    strings over a toy vocabulary the two gave the same ids. Its class is a slow one, this is not.
    """
