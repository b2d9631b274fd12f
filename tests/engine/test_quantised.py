# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: each layer computes what its checkpoint stands for, or the start ends."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from tests.device import ON_CARD, multiplies_by_4_bits
from tests.quantised import FORMATS, FOUR_BITS, quantise
from tests.tiny_llada_v import TinyLLaDAV, picture
from vllm_elastic.bench.engine import BenchEngine
from vllm_elastic.bench.problems import accuracy_of
from vllm_elastic.runner import quantised_products
from vllm_elastic.runner.quantised_products import int8_sums_overflow

from .conftest import Served
from .test_accuracy import TINY
from .test_images import made_of

sys.path.insert(0, str(TINY))

pytestmark = pytest.mark.engine

NEEDS_4_BITS = pytest.mark.skipif(
    not multiplies_by_4_bits(), reason="vLLM has no such kernels for this CPU"
)


def formats(*cases: Any) -> list[Any]:
    """Cases whose first is a format's name; left out where this machine has no kernel for it."""
    marks = {name: NEEDS_4_BITS for name in FOUR_BITS}
    return [
        pytest.param(*case, marks=marks.get(case[0], ()))
        for case in ((case,) if isinstance(case, str) else case for case in cases)
    ]


def close(name: str) -> float:
    """Of a product's norm: activations have 8 bits in bfloat16, 7 and a scale for each row in
    int8, whose sums overflow on old CPUs."""
    if name in FOUR_BITS:
        return 0.005
    return 0.08 if not ON_CARD and int8_sums_overflow() else 0.015


NAMES = {
    "gqa-tied": {
        "attention.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "attention.o_proj": ("attn_out",),
        "mlp.gate_up_proj": ("ff_proj", "up_proj"),
        "mlp.down_proj": ("ff_out",),
    },
    "dream": {
        "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attention.o_proj": ("self_attn.o_proj",),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj": ("mlp.down_proj",),
    },
}
"""A model's layers -> what its checkpoints call their parts."""

BLOCKS = {"gqa-tied": "model.transformer.blocks", "dream": "model.layers"}


def engine_of(directory: Path, **options: Any) -> Any:
    options = {"max_model_len": 64, "kv_cache_memory_bytes": 8 << 20} | options
    return BenchEngine(directory, dtype="bfloat16", **options)


def relative_errors(model: Any, family: str, stands_for: dict[str, Tensor]) -> dict[str, float]:
    """Of each linear layer on random rows; negative where its weights are as they were."""
    generator, errors = torch.Generator().manual_seed(5), {}
    for index, block in enumerate(model.blocks):
        prefix = f"{BLOCKS[family]}.{index}"
        for ours, theirs in NAMES[family].items():
            layer = block.get_submodule(ours)
            weight = torch.cat([stands_for[f"{prefix}.{name}.weight"] for name in theirs])
            biases = [stands_for.get(f"{prefix}.{name}.bias") for name in theirs]
            bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
            rows = torch.randn(7, weight.shape[1], generator=generator).to(torch.bfloat16)
            with torch.inference_mode():
                found = layer(rows)[0].float()
            wanted = F.linear(rows.float(), weight, bias)
            error = ((found - wanted).norm() / wanted.norm()).item()
            as_it_was = isinstance(layer.quant_method, UnquantizedLinearMethod)
            errors[f"{index}.{ours}"] = -error if as_it_was else error
    return errors


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("name", formats(*FORMATS))
def test_layers_are_what_the_checkpoint_stands_for(
    name: str, family: str, serve: Callable[[str], Served], tmp_path: Path
) -> None:
    stands_for = quantise(serve(family).directory, tmp_path / name, name)
    engine = engine_of(tmp_path / name)
    errors = relative_errors(engine.runner.model, family, stands_for)
    assert all(0 < error < close(name) for error in errors.values()), errors
    (result,) = engine.run([{"prompt_token_ids": [3, 4, 5], "max_tokens": 12}])
    assert len(result["token_ids"]) == 12


BLOCK_0 = "model.transformer.blocks.0"
MLP = [f"{BLOCK_0}.{name}" for name in ("ff_proj", "up_proj", "ff_out")]
ATTENTION = [["q_proj", "k_proj", "v_proj"], ["attn_out"]]


@pytest.mark.parametrize(
    ("name", "said", "blocks", "left"),
    formats(
        ("gptq", {}, 1, MLP),  # told by the tensors
        ("gptq", {"modules_in_block_to_quantize": ATTENTION}, 5, MLP),
        ("gptq", {"dynamic": {r"-:.*\.0\.mlp\..*": {}}}, 1, MLP),
        ("awq", {}, 1, MLP),
        ("awq", {"modules_to_not_convert": MLP[:2]}, 1, MLP[:2]),
        ("int8", {"ignore": MLP}, 1, MLP),
    ),
)
def test_what_is_left_as_it_was(
    name: str,
    said: dict[str, Any],
    blocks: int,
    left: list[str],
    serve: Callable[[str], Served],
    tmp_path: Path,
) -> None:
    """A checkpoint says under its own names which layers those are, here of the first blocks."""
    family, source = "gqa-tied", serve("gqa-tied").directory
    everywhere = [path.replace(".0.", f".{i}.") for path in left for i in range(blocks)]
    stands_for = quantise(source, tmp_path / name, name, left=everywhere, **said)
    errors = relative_errors(engine_of(tmp_path / name).runner.model, family, stands_for)
    as_they_were = {layer for layer, error in errors.items() if error <= 0}
    layers = ["gate_up_proj", "down_proj"][: len(left) - 1]
    assert as_they_were == {f"{i}.mlp.{layer}" for i in range(blocks) for layer in layers}
    assert all(abs(error) < close(name) for error in errors.values()), errors


@pytest.mark.slow
def test_problems_solved_with_8_bits(tmp_path: Path) -> None:
    """Of 200 it solves 99%; with 4 bits 82%."""
    from heldout import HELD_OUT_SEED, records

    quantise(TINY / "checkpoint", tmp_path / "int8", "int8")
    options = {"max_model_len": 640, "kv_cache_memory_bytes": 200 << 20}
    engine = engine_of(tmp_path / "int8", batch_size=16, **options)
    problems = list(records(HELD_OUT_SEED, 40, None))
    accuracy = accuracy_of(problems, engine.run(problems))
    assert accuracy is not None and accuracy > 0.9


@pytest.mark.parametrize(
    ("name", "said"),
    formats(
        ("int8", {"ignore": ["lm_head", "re:.*vision_tower.*", "re:.*mm_projector.*"]}),
        ("gptq", {}),
        ("awq", {}),
    ),
)
def test_images_of_a_quantised_model(name: str, said: dict[str, Any], tmp_path: Path) -> None:
    """The tower is left as it is, and images become the same rows to the last bit."""
    TinyLLaDAV().save(tmp_path / "plain")
    quantise(tmp_path / "plain", tmp_path / name, name, **said)
    images = [picture(56, 56, seed=7), picture(100, 60, seed=8)]
    options = {"max_model_len": 256, "mm_processor_cache_gb": 0}
    plain, engine = (engine_of(tmp_path / which, **options) for which in ("plain", name))
    for rows, wanted in zip(made_of(engine, images)[1], made_of(plain, images)[1], strict=True):
        assert torch.equal(rows, wanted)
    methods = {type(block.mlp.down_proj.quant_method) for block in engine.runner.model.blocks}
    assert UnquantizedLinearMethod not in methods


def test_a_layer_that_is_missing_is_named(serve: Callable[[str], Served], tmp_path: Path) -> None:
    quantise(serve("gqa-tied").directory, tmp_path / "part", "packed")
    file = tmp_path / "part" / "model.safetensors"
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if f"{BLOCK_0}.k_proj" not in name}
    save_file(kept, file)
    with pytest.raises(ValueError, match=r"nothing for 1 of .*blocks\.0\.attention\.k_proj"):
        engine_of(tmp_path / "part")


@pytest.mark.parametrize("value", [pytest.param(0.0, marks=NEEDS_4_BITS), 0.5])
def test_a_bias_that_the_model_has_not(
    value: float, serve: Callable[[str], Served], tmp_path: Path
) -> None:
    """AutoGPTQ gives every layer one, of zeros; one that says something is not left out."""
    bias = {f"{BLOCK_0}.attn_out.bias": torch.full((128,), value, dtype=torch.bfloat16)}
    quantise(serve("gqa-tied").directory, tmp_path / "biased", "gptq", beside=bias)
    if not value:
        engine_of(tmp_path / "biased")
        return
    with pytest.raises(ValueError, match=r"has no tensor .*attn_out\.bias"):
        engine_of(tmp_path / "biased")


def test_keys_stay_as_the_model_computes_them(
    serve: Callable[[str], Served], tmp_path: Path
) -> None:
    """Statistics read them: a checkpoint that has scales for keys of 8 bits does not get these."""
    scales = {f"{BLOCK_0}.{which}_scale": torch.tensor(2.0) for which in "kv"}
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}
    source = serve("gqa-tied").directory
    quantise(source, tmp_path / "int8", "int8", beside=scales, kv_cache_scheme=scheme)
    engine = engine_of(tmp_path / "int8")
    assert {cache.dtype for cache in engine.runner.kv_caches.values()} == {torch.bfloat16}


# What a CPU cannot do.


@pytest.mark.skipif(ON_CARD, reason="of CPUs")
def test_a_cpu_without_kernels_is_refused_at_start(
    serve: Callable[[str], Served], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first request would end the server."""

    def missing(*args: Any) -> Tensor:
        raise AttributeError("'_OpNamespace' '_C' object has no attribute 'cpu_gemm_wna16'")

    monkeypatch.setattr(CPUWNA16LinearKernel, "apply_weights", missing)
    quantise(serve("gqa-tied").directory, tmp_path / "gptq", "gptq")
    with pytest.raises(RuntimeError, match=r"--quantization \w*gptq on this CPU .*AVX-512"):
        engine_of(tmp_path / "gptq")


@pytest.mark.skipif(ON_CARD, reason="of CPUs")
@pytest.mark.parametrize("overflow", [True, False])
@pytest.mark.parametrize("name", [None, "int8"])
def test_products_that_overflow_are_said(
    name: str | None,
    overflow: bool,
    serve: Callable[[str], Served],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(quantised_products, "int8_sums_overflow", lambda: overflow)
    monkeypatch.setattr(quantised_products.logger, "warning", lambda text: said.append(text))
    directory = serve("gqa-tied").directory
    if name is not None:
        quantise(directory, tmp_path / name, name)
        directory = tmp_path / name
    engine_of(directory)
    assert len(said) == (overflow and name is not None), said
    assert all("VNNI" in text for text in said)


@pytest.mark.skipif(ON_CARD, reason="of CPUs")
def test_whether_sums_overflow_is_what_the_cpu_has() -> None:
    """VNNI, under any of its names, adds up in 32 bits."""
    flags = Path("/proc/cpuinfo").read_text()
    assert int8_sums_overflow() != any(name in flags for name in ("vnni", "amx_int8"))
