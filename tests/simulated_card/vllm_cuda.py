# SPDX-License-Identifier: Apache-2.0
"""vLLM's CUDA build on a card that is not there, out of its CPU build.

Platform, worker, backends and their metadata are vLLM's own. Kernels that it compiles ahead come
from its CPU build. What would take seconds a pass in Triton's interpreter is torch's: attention and
cache writes, and of ours statistics and candidates, whose kernels have tests of their own there.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Parameter

from tests.second_device import OnSecond
from tests.simulated_card.torch_cuda import launched


def install() -> None:
    """Before vLLM has chosen its platform. For good."""
    sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
    flash_attention = _flash_attention()
    for name in (flash_attention.__name__, f"{flash_attention.__name__}.flash_attn_interface"):
        sys.modules[name] = flash_attention
    import triton.backends
    import vllm.platforms

    triton.backends.backends["nvidia"].driver.is_active = staticmethod(lambda: True)
    vllm.platforms.vllm_version_matches_substr = lambda substring: False
    from vllm.platforms.cpu import CpuPlatform
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Card(NonNvmlCudaPlatform):
        dist_backend = "gloo"
        dispatch_key = "CPU"  # where an operator of vLLM's own is to be found

        @classmethod
        def device_count(cls) -> int:
            return 1

    vllm.platforms._current_platform = Card()
    CpuPlatform.import_kernels()
    _define_operators()
    _keep_parameters_kinds()
    _launch_kernels()
    _replace_slow_kernels()


def _flash_attention() -> types.ModuleType:
    """FlashAttention 3, without a schedule made ahead."""
    module = types.ModuleType("vllm.vllm_flash_attn")
    module.FA2_AVAILABLE, module.FA3_AVAILABLE = False, True
    module.is_fa_version_supported = lambda version, *args, **kwargs: version == 3
    module.fa_version_unsupported_reason = lambda version, *args, **kwargs: None
    module.compile_flash_attn_varlen_func_from_specs = None
    module.get_scheduler_metadata = lambda **kwargs: None
    module.flash_attn_varlen_func = launched(attend)
    return module


def _define_operators() -> None:
    """Those of CUDA builds alone that are called while vLLM is imported, and a few of ours."""
    for library, schema, function in (
        ("_C", "cutlass_scaled_mm_supports_fp8(int capability) -> bool", lambda _: False),
        ("_C", "cutlass_scaled_mm_supports_block_fp8(int capability) -> bool", lambda _: False),
        ("_C", "cutlass_group_gemm_supported(int capability) -> bool", lambda _: False),
        ("_C", "weak_ref_tensor(Tensor(a) tensor) -> Tensor(a)", lambda tensor: tensor),
    ):
        own = torch.library.Library(library, "FRAGMENT")
        own.define(schema)
        own.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        _libraries.append(own)


_libraries: list[torch.library.Library] = []


def _keep_parameters_kinds() -> None:
    """torch makes a parameter out of a tensor of another kind by marking it; vLLM's own parameters
    know how they are loaded."""
    from vllm.model_executor.parameter import BasevLLMParameter

    @functools.cache
    def of_the_card(kind: type) -> type:
        return type(kind.__name__, (kind, OnSecond), {})

    make = BasevLLMParameter.__new__

    def new(cls: Any, data: torch.Tensor, **kwargs: Any) -> Any:
        if not isinstance(data, OnSecond):
            return make(cls, data, **kwargs)
        parameter = Parameter(data, requires_grad=False)
        parameter.__class__ = of_the_card(cls)
        return parameter

    BasevLLMParameter.__new__ = new


def _launch_kernels() -> None:
    """Triton's over the card's memory by the interpreter, attention and cache writes by torch."""
    import vllm.v1.attention.backends.fa_utils as flash
    import vllm.v1.attention.backends.triton_attn as triton_attention
    from triton.runtime.interpreter import GridExecutor

    import tests.triton_interpreter  # noqa: F401  # mends it

    GridExecutor.__call__ = launched(GridExecutor.__call__)
    flash.reshape_and_cache_flash = launched(write)
    triton_attention.triton_reshape_and_cache_flash = launched(write)
    triton_attention.unified_attention = launched(attend)


def _replace_slow_kernels() -> None:
    """Of ours."""
    from vllm_elastic.runner import candidate_kernel, candidates, sampling_kernel
    from vllm_elastic.runner.statistics import attention_sums, pass_statistics

    def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        token_ids, probabilities = launched(candidates.most_probable)(logits)
        return OnSecond(token_ids), OnSecond(probabilities)

    def sample(logits: torch.Tensor, draws: Any, rows: slice, *found: torch.Tensor) -> None:
        numbers = draws.integers, draws.floats, draws.streams
        here = draws.within(rows)
        launched(draw)(logits, *(each[here] for each in numbers), rows.start, *found)

    candidate_kernel.most_probable_by_kernel = most_probable
    sampling_kernel.sample_by_kernel = sample
    pass_statistics.attention_sums = attention_sums.TorchSums


def draw(
    logits: torch.Tensor,
    integers: torch.Tensor,
    floats: torch.Tensor,
    streams: torch.Tensor,
    first_row: int,
    token_ids: torch.Tensor,
    probabilities: torch.Tensor,
) -> None:
    """What ``sampling_kernel`` does, row by row."""
    from vllm_elastic.decoding.sampling import Sampling
    from vllm_elastic.runner import candidates, counter_random
    from vllm_elastic.runner.draws import Confidence

    for (row, top_k, is_noisy, confidence), (temperature, log_min_p, top_p), stream in zip(
        integers.tolist(), floats.tolist(), streams, strict=True
    ):
        row -= first_row
        limits = Sampling(top_k=top_k, top_p=top_p, min_p=math.exp(log_min_p))
        wide = logits[row : row + 1].double()
        tempered = candidates._filtered(wide / temperature, limits)
        value = tempered
        if is_noisy:
            noise = counter_random.numbers_of(stream[None], wide.shape[1])
            value = tempered - torch.log(-torch.log(noise))
        token_ids[row] = token_id = value.argmax()
        match Confidence(confidence):
            case Confidence.UNTEMPERED:
                of, alg = wide, ""
            case Confidence.TEMPERED:
                of, alg = tempered, ""
            case Confidence.ENTROPY:
                of, alg = tempered, "entropy"
            case Confidence.MARGIN:
                of, alg = tempered, "topk_margin"
        chosen = token_id[None]
        probabilities[row] = candidates._confidence(of.softmax(dim=-1), chosen, alg)[0]


def write(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *_: Any,
) -> None:
    """Rows [N, Hkv, D] into caches [blocks, positions, Hkv, D], by slots [N]."""
    blocks, places = slots // key_cache.shape[1], slots % key_cache.shape[1]
    key_cache[blocks, places] = keys[: len(slots)]
    value_cache[blocks, places] = values[: len(slots)]


def attend(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: torch.Tensor,
    **_: Any,
) -> None:
    """Rows [N, H, D], request by request, to all of its positions in a paged cache.

    Each row by itself: a kernel's numbers for a row do not depend on how many others there are,
    those of a CPU's products may.
    """
    assert causal is False
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    assert max(lengths) <= max_seqlen_k, "a kernel is launched for fewer positions"
    for request, length in enumerate(lengths):
        rows = slice(starts[request], starts[request + 1])
        if rows.start == rows.stop:
            continue
        assert rows.stop - rows.start <= max_seqlen_q, "a kernel is launched for fewer rows"
        blocks = block_table[request, : -(-length // k.shape[1])].long()
        queries = q[rows].float()[:, :, None]  # [N, H, 1, D]
        keys, values = (
            paged[blocks]
            .flatten(0, 1)[:length]
            .float()
            .transpose(0, 1)
            .expand(len(queries), -1, -1, -1)
            for paged in (k, v)
        )
        found = F.scaled_dot_product_attention(
            queries, keys, values, scale=softmax_scale, enable_gqa=True
        )
        out[rows] = found[:, :, 0].to(out.dtype)
