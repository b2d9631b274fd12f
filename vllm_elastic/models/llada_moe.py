# SPDX-License-Identifier: Apache-2.0
"""LLaDA-MoE (LLaDA-MoE-7B-A1B-Base, LLaDA-MoE-7B-A1B-Instruct).

OLMoE without a causal mask, but with norms of queries and keys head by head: every layer has
experts, none is shared, and the weights of the chosen ones are not scaled to sum to 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_elastic.models.experts import ExpertsMLP
from vllm_elastic.models.llama_config import LlamaKeysConfig
from vllm_elastic.models.llama_like import LlamaLike

_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+\..+)")


class LLaDAMoEModelLM(LlamaLike):
    """Weight names are those of the released checkpoints: Llama's, with OLMoE's experts."""

    loaded_apart = (".experts.",)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._vllm_config = vllm_config

    @staticmethod
    def make_mlp(vllm_config: VllmConfig, prefix: str, config: LlamaKeysConfig) -> nn.Module:
        return ExpertsMLP(
            vllm_config,
            prefix,
            width=config.hidden_size,
            inner=config.expert_intermediate_size,
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
        )

    def pass_context(self) -> AbstractContextManager[None]:
        """vLLM finds its experts by name in a context of the whole pass."""
        return set_forward_context(None, self._vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = set()
        return self.load_named(self._dense(weights, loaded)) | loaded

    def _dense(
        self, weights: Iterable[tuple[str, torch.Tensor]], loaded: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors but the experts', which are loaded on the way and noted."""
        for name, weight in weights:
            found = _EXPERT.fullmatch(name)
            if found is None:
                yield name, weight
                continue
            prefix = f"blocks.{found[1]}.mlp.experts"
            filled = list(self.get_submodule(prefix).load_weights([(found[2], weight)]))
            if not filled:
                raise ValueError(f"{type(self).__name__} has no tensor {name!r}.")
            loaded.update(f"{prefix}.{parameter}" for parameter in filled)
