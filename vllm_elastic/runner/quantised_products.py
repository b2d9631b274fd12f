# SPDX-License-Identifier: Apache-2.0
"""Whether a CPU multiplies by quantised weights as it should: asked at start, of every layer.

vLLM's CPU build has kernels for some instruction sets only. A GPU's are tried by the trial run.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as kernels
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel

logger = init_logger("vllm.vllm_elastic.runner.quantised_products")


@torch.inference_mode()
def check_products(model: Any, quantisation: str) -> None:
    """Let one row go through every layer.

    Args:
        model: a ``DiffusionTransformer`` on a CPU. quantisation: vLLM's name of the format.

    Raises:
        RuntimeError: this CPU has no kernel for it.
    """
    weight = model.embed_tokens.weight
    row = weight.new_zeros(1, model.width)
    position = torch.zeros(1, dtype=torch.int64, device=weight.device)
    try:
        with model.pass_context():
            for block in model.blocks:
                q, _, _ = block.project(row.clone(), position)
                block.finish(row.clone(), block.attention_buffer(q).flatten(1))
    except (AttributeError, NotImplementedError, RuntimeError) as error:
        raise RuntimeError(
            f"vLLM cannot multiply by weights of --quantization {quantisation} on this CPU "
            f"({error}). Its kernels for them take AVX-512: serve the checkpoint on a machine that "
            "has it, or the model as it was before it was quantised (vllm_elastic)."
        ) from error
    if _has_int8(model) and int8_sums_overflow():
        logger.warning(
            "products of 8 bits overflow on this CPU, which has no instruction for them (VNNI): "
            "vLLM's are off by some 5%%. The model as it was before it was quantised is exact"
        )


def _has_int8(model: Any) -> bool:
    """Whether vLLM gives products of 8 bits to oneDNN."""
    used = (getattr(getattr(each, "scheme", None), "kernel", None) for each in model.modules())
    return any(isinstance(kernel, CPUInt8ScaledMMLinearKernel) for kernel in used)


def int8_sums_overflow() -> bool:
    """Whether oneDNN adds up pairs of products in 16 bits: without VNNI it has nothing else."""
    size, largest = 32, 127
    weight = torch.full((size, size), largest, dtype=torch.int8, device="cpu")
    row = torch.full((1, size), largest, dtype=torch.int8, device="cpu")
    scale = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    product = torch.empty(1, size, dtype=torch.float32, device="cpu")
    handler = kernels.create_onednn_scaled_mm(
        weight.t(), scale.expand(size, 1).contiguous(), torch.float32, True, False
    )
    kernels.onednn_scaled_mm(handler, row, product, scale, None, None, None)
    return bool((product != size * largest**2).any())
