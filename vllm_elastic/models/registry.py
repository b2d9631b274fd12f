# SPDX-License-Identifier: Apache-2.0
"""The architectures that are served, and what decoding has to know of each.

Imports no model: every process of vLLM reads this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_elastic.decoding.traits import DecodingTraits


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture.

    Attributes:
        config: ``module:Class`` of its configuration, a transformers ``PretrainedConfig``.
        model: ``module:Class`` of its model, a ``models.transformer.DiffusionTransformer``.
        tokenizer: ``module:Class`` of what stands in for a checkpoint's remote code; None where
            transformers knows the tokenizer.
        takes_adapters: whether adapters (LoRA) can be added to its layers.
        compiles: whether its layers differ in their tensors alone. Experts do not: vLLM finds a
            layer's by a name.
    """

    config: str
    model: str
    tokenizer: str | None = None
    takes_adapters: bool = True
    compiles: bool = True


FAMILIES: dict[str, Family] = {
    "LLaDAModelLM": Family(
        config="vllm_elastic.models.llada_config:LLaDAConfig",
        model="vllm_elastic.models.llada:LLaDAModelLM",
    ),
    "LlavaLLaDAModelLM": Family(
        config="vllm_elastic.models.llada_v_config:LLaDAVConfig",
        model="vllm_elastic.models.llada_v:LlavaLLaDAModelLM",
        takes_adapters=False,
    ),
    "DreamModel": Family(
        config="vllm_elastic.models.dream_config:DreamConfig",
        model="vllm_elastic.models.dream:DreamModel",
        tokenizer="vllm_elastic.models.dream_tokenizer:DreamTokenizer",
    ),
    "ILLaDAForCausalLM": Family(
        config="vllm_elastic.models.illada_config:ILLaDAConfig",
        model="vllm_elastic.models.illada:ILLaDAForCausalLM",
    ),
    "LLaDAMoEModelLM": Family(
        config="vllm_elastic.models.llada_moe_config:LLaDAMoEConfig",
        model="vllm_elastic.models.llada_moe:LLaDAMoEModelLM",
        takes_adapters=False,
        compiles=False,
    ),
}
"""By the name that a config.json has under ``architectures``."""


def traits_of(hf_config: Any) -> DecodingTraits:
    """What decoding has to know of a model.

    Args:
        hf_config: its configuration, of one of the ``FAMILIES``. A family whose logits are shifted
            has ``logits_shift`` in its configuration class, one that takes images has
            ``image_token_id``, one whose sampler bans tokens ``never_chosen_ids``.
    """
    return DecodingTraits(
        num_layers=hf_config.num_hidden_layers,
        vocab_size=hf_config.vocab_size,
        mask_token_id=hf_config.mask_token_id,
        end_of_text_id=hf_config.eos_token_id,
        end_of_turn_id=getattr(hf_config, "eot_token_id", None),
        stop_ids=tuple(getattr(hf_config, "stop_ids", ())),
        # A mask that was committed would leave its position undecided.
        never_chosen=(hf_config.mask_token_id, *getattr(hf_config, "never_chosen_ids", ())),
        logits_shift=getattr(hf_config, "logits_shift", 0),
        image_token_id=getattr(hf_config, "image_token_id", None),
        grow_by=getattr(hf_config, "grow_by", 0),
    )
