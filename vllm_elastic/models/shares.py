# SPDX-License-Identifier: Apache-2.0
"""What tensor-parallel ranks share of a model, and whether they can."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def padded_rows(vocabulary: int) -> int:
    """Rows of the embedding, and of the head, over all ranks: vLLM pads both to multiples of 64."""
    return -(-vocabulary // 64) * 64


def undivided_by(config: PretrainedConfig, ranks: int) -> str:
    """What ``ranks`` tensor-parallel ranks cannot share evenly, in words; "" if they can.

    KV heads may be fewer than ranks: several then keep the same one, as vLLM does.

    Args:
        config: of any family.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = padded_rows(config.embedding_size)
    problems = {
        f"{heads} heads": heads % ranks,
        f"{kv_heads} KV heads": max(kv_heads, ranks) % min(kv_heads, ranks),
        f"an MLP of width {config.intermediate_size}": config.intermediate_size % ranks,
        f"{rows} (padded) rows of the vocabulary": rows % ranks,
    }
    return " and ".join(what for what, rest in problems.items() if rest)
