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
        logits_shift: see ``DecodingTraits``.
    """

    config: str
    model: str
    logits_shift: int = 0


FAMILIES: dict[str, Family] = {
    "LLaDAModelLM": Family(
        config="vllm_elastic.models.llada_config:LLaDAConfig",
        model="vllm_elastic.models.llada:LLaDAModelLM",
    ),
}
"""By the name that a config.json has under ``architectures``."""


def traits_of(hf_config: Any) -> DecodingTraits:
    """What decoding has to know of a model.

    Args:
        hf_config: its configuration, of one of the ``FAMILIES``.
    """
    family = FAMILIES[hf_config.architectures[0]]
    ends = (hf_config.eos_token_id, getattr(hf_config, "eot_token_id", None))
    return DecodingTraits(
        num_layers=hf_config.num_hidden_layers,
        vocab_size=hf_config.vocab_size,
        mask_token_id=hf_config.mask_token_id,
        text_end_ids=tuple(token_id for token_id in ends if token_id is not None),
        # A mask that was committed would leave its position undecided.
        never_chosen=(hf_config.mask_token_id,),
        logits_shift=family.logits_shift,
    )
