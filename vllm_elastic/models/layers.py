# SPDX-License-Identifier: Apache-2.0
"""What the families are made of: norm, attention projection and MLP, on vLLM's parallel layers.

All of them work on rows [R, d], each row by itself; none knows of passes, plans or caches.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from vllm import _custom_ops as kernels
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope


class KernelRMSNorm(RMSNorm):
    """vLLM's RMSNorm by its compiled kernel.

    In eager mode on CPU vLLM takes half a dozen torch operators for it, which for a window pass's
    rows is 25 times as long: they are there for a compiler to fuse.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()  # the kernel takes rows for neighbours; a lone head's are not
        out = torch.empty_like(x)
        kernels.rms_norm(out, x, self.weight.data, self.variance_epsilon)
        return out

    def of_sum(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        """The norm of ``x + gain`` [R, d], by one kernel; ``x`` becomes the sum.

        In float32 to the bit what adding and norming give. In bfloat16 the sum is the same too,
        but on CPUs without instructions for bfloat16, whose kernels cut numbers off; a CPU's kernel
        norms it as it was before it was rounded.

        Args:
            x, gain: [R, d] contiguous. The norm takes the place of the gain.
        """
        kernels.fused_add_rms_norm(gain, x, self.weight.data, self.variance_epsilon)
        return gain


class AttentionProjection(nn.Module):
    """Queries, keys and values of rows, rotated; and what becomes of their attention.

    Attributes:
        attn: vLLM's attention layer, which owns the paged keys and values.
        num_heads, num_kv_heads: of this rank.
        scale: of the scores, head_dim ** -0.5.

    Args:
        head_norm_eps: queries and keys are normed, each head by itself, before they are rotated;
            None: they are not.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        width: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        max_position: int,
        rope_parameters: dict[str, Any],
        qkv_bias: bool = False,
        head_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        self.num_heads = num_heads // ranks
        self.num_kv_heads = max(1, num_kv_heads // ranks)
        self.head_dim = head_dim
        self.scale = head_dim**-0.5
        self.qkv_proj = QKVParallelLinear(
            width,
            head_dim,
            num_heads,
            num_kv_heads,
            bias=qkv_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            width,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = self.k_norm = None
        if head_norm_eps is not None:
            self.q_norm = KernelRMSNorm(head_dim, eps=head_norm_eps)
            self.k_norm = KernelRMSNorm(head_dim, eps=head_norm_eps)
        self.rotary_emb = get_rope(
            head_dim,
            max_position=max(max_position, vllm_config.model_config.max_model_len),
            rope_parameters=rope_parameters,
            is_neox_style=True,
        )
        # Without a quant_config: statistics read keys in the model's own type, so a checkpoint does
        # not get to say that they are kept in fewer bits.
        self.attn = Attention(
            self.num_heads,
            head_dim,
            self.scale,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.attn",
        )

    def project(
        self, normed: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [R, Hq, D], rotated k [R, Hkv, D] and v [R, Hkv, D] of rows [R, d].

        Args:
            positions: int64 [R], canvas positions.
        """
        qkv, _ = self.qkv_proj(normed)
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q.reshape(-1, self.head_dim)).view(q.shape)
            k = self.k_norm(k.reshape(-1, self.head_dim)).view(k.shape)
        q, k = self.rotary_emb(positions, q, k)
        return (
            q.view(-1, self.num_heads, self.head_dim),
            k.view(-1, self.num_kv_heads, self.head_dim),
            v.view(-1, self.num_kv_heads, self.head_dim),
        )

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """What attention [R, Hq * D] adds to rows [R, d]."""
        return self.o_proj(attended)[0]


class GatedMLP(nn.Module):
    """SwiGLU, as in Llama."""

    def __init__(self, vllm_config: VllmConfig, prefix: str, *, width: int, inner: int) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            width,
            [inner] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            inner, width, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        # Not vLLM's compiled kernel on a CPU: it takes three times as long.
        self.act = SiluAndMul()

    def forward(self, normed: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(normed)[0]))[0]


class Block(Protocol):
    """A layer as two functions of rows, with attention between them."""

    def project(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [R, Hq, D], k and v [R, Hkv, D] of the layer's input [R, d]."""
        ...

    def attention_buffer(self, q: torch.Tensor) -> torch.Tensor:
        """Zeros [R, Hq, D]: attention to queries of that shape is written into them."""
        ...

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The layer's output [R, d], from its input and the attention output [R, Hq * D].

        It may be written over the input.
        """
        ...


class PreNormBlock(nn.Module):
    """A pre-norm transformer block (``Block``).

    Args:
        attention_norm, mlp_norm: before either part.
        mlp: rows [R, d] to what they gain.
    """

    def __init__(
        self,
        attention_norm: KernelRMSNorm,
        attention: AttentionProjection,
        mlp_norm: KernelRMSNorm,
        mlp: nn.Module,
    ) -> None:
        super().__init__()
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    @property
    def attn(self) -> Attention:
        return self.attention.attn

    def project(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.attention.project(self.attention_norm(x), positions)

    def attention_buffer(self, q: torch.Tensor) -> torch.Tensor:
        return torch.zeros(q.shape, dtype=q.dtype, device=q.device)

    def finish(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """``Block.finish``; always written over ``x``."""
        normed = self.mlp_norm.of_sum(x, self.attention.output(attended))
        return x.add_(self.mlp(normed))
