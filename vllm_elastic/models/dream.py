# SPDX-License-Identifier: Apache-2.0
"""Dream (Dream-v0-7B, Dream-Coder-v0-7B, DiffuCoder-7B).

Qwen2 without a causal mask: grouped KV heads, a bias on queries, keys and values only. It was
trained on from a next-token predictor, so position p is predicted from row p - 1. (Dream's own code
moves the whole row of logits by one and predicts position 0 from its own row; here a canvas begins
with a prompt, and position 0 is never predicted.)
"""

from __future__ import annotations

from vllm_elastic.models.llama_like import LlamaLike


class DreamModel(LlamaLike):
    """Weight names are those of the released checkpoints, which are Qwen2's, and so Llama's."""
