# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on vLLM's fused kernels: rows to what they gain, as any other MLP."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear


class ExpertsMLP(nn.Module):
    """The ``top_k`` most probable of the experts for each row, weighted by these probabilities.

    The probabilities are a softmax over all experts; those of the chosen ones are not scaled to
    sum to 1. Ranks share every expert, as they share an MLP. Data-parallel engines share nothing,
    so none of them has to wait for another.

    Args:
        inner: width of an expert.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        width: int,
        inner: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        super().__init__()
        self.gate = GateLinear(width, num_experts, prefix=f"{prefix}.gate")
        self.experts = FusedMoEFactory(
            num_experts=num_experts,
            top_k=top_k,
            hidden_size=width,
            intermediate_size=inner,
            renormalize=False,
            quant_config=vllm_config.quant_config,
            dp_size=1,
            prefix=f"{prefix}.experts",
        )

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        scores, _ = self.gate(normed)
        return self.experts(normed, scores)
