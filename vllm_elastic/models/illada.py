# SPDX-License-Identifier: Apache-2.0
"""iLLaDA (iLLaDA-8B-Base, iLLaDA-8B-Instruct; arXiv 2606.25331).

Llama without a causal mask: grouped KV heads, a tied head, no biases. Its answers grow.
"""

from __future__ import annotations

from vllm_elastic.models.llama_like import LlamaLike


class ILLaDAForCausalLM(LlamaLike):
    """Its weights are those of a Llama; only the configuration is its own."""
