# SPDX-License-Identifier: Apache-2.0
"""LLaDA (LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5): Llama-like, under names of its own."""

from __future__ import annotations

import re
from typing import ClassVar

from vllm.model_executor.models.utils import WeightsMapper

from vllm_elastic.models.llama_like import LlamaLike, in_blocks


class LLaDAModelLM(LlamaLike):
    """Weight names are those of the released checkpoints (``model.transformer.*``)."""

    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^(model\.)?transformer\.ff_out\b"): "lm_head",
            re.compile(r"^(model\.)?transformer\."): "",
            re.compile(r"^wte\b"): "embed_tokens",
            re.compile(r"^ln_f\b"): "norm",
            **in_blocks(
                {
                    "attn_norm": "attention_norm",
                    "([qkv]_proj)": r"attention.\2",
                    "attn_out": "attention.o_proj",
                    "ff_norm": "mlp_norm",
                    "ff_proj": "mlp.gate_proj",
                    "up_proj": "mlp.up_proj",
                    "ff_out": "mlp.down_proj",
                }
            ),
        }
    )
