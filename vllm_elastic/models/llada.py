# SPDX-License-Identifier: Apache-2.0
"""LLaDA (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5): Llama-like, under names of its own."""

from __future__ import annotations

from typing import ClassVar

from vllm_elastic.models.llama_like import LlamaLike
from vllm_elastic.models.transformer import Stacked

IN_BLOCKS = {
    "attn_norm": "attention_norm",
    "attn_out": "attention.o_proj",
    "ff_norm": "mlp_norm",
    "ff_out": "mlp.down_proj",
}
OUTSIDE = {"wte": "embed_tokens", "ln_f": "norm", "ff_out": "lm_head"}


class LLaDAModelLM(LlamaLike):
    """Weight names are those of the released checkpoints (``model.transformer.*``)."""

    stacked: ClassVar[Stacked] = {
        "q_proj": ("attention.qkv_proj", "q"),
        "k_proj": ("attention.qkv_proj", "k"),
        "v_proj": ("attention.qkv_proj", "v"),
        "ff_proj": ("mlp.gate_up_proj", 0),
        "up_proj": ("mlp.gate_up_proj", 1),
    }

    def _name_of(self, name: str) -> str | None:
        name = name.removeprefix("model.").removeprefix("transformer.")
        if name.startswith("blocks."):
            _, index, module, suffix = name.split(".", 3)
            return f"blocks.{index}.{IN_BLOCKS.get(module, module)}.{suffix}"
        module, _, suffix = name.partition(".")
        if module == "ff_out" and self.tied:
            return None
        return f"{OUTSIDE.get(module, module)}.{suffix}"
