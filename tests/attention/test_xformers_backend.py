# SPDX-License-Identifier: Apache-2.0
"""The backend on xformers: over a stand-in of the operator, and over the operator where it is.

`make xformers-test` brings the operator, into Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import FullAttentionSpec

from tests import triton_interpreter  # noqa: F401
from tests.device import DEVICE
from vllm_elastic.attention import naive, xformers_backend
from vllm_elastic.attention.key_layout import KeyLayout
from vllm_elastic.attention.xformers_backend import XFormersBackend

from . import xformers_stand_in

NAN = float("nan")
SCALE = 0.3
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Scores are summed in float32; a probability is rounded to the queries' type.
TOLERANCE = {"f32": 2e-5, "bf16": 2e-2, "f16": 2e-3}
MAX_MODEL_LEN = 300


@pytest.fixture(params=["stand-in", "xformers"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the operator under test works."""
    if request.param == "stand-in":
        monkeypatch.setattr(xformers_backend, "operator", lambda: xformers_stand_in)
        return torch.device("cpu")
    lacking = xformers_backend.missing()
    if lacking is not None:
        pytest.skip(f"{lacking}; make xformers-test has it")
    return DEVICE


class Layer:
    """An attention layer of the backend, and what vLLM builds around it.

    Attributes:
        kv_cache: [blocks, Hkv, N, 2 * D], NaN throughout.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        dim: int = 32,
        block_size: int = 16,
        num_blocks: int = 40,
        dtype: torch.dtype = torch.float32,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        self.num_kv_heads, self.head_size, self.block_size = kv_heads, dim, block_size
        self.device, self.heads, self.dtype = device, heads, dtype
        model = SimpleNamespace(
            max_model_len=max_model_len, get_num_attention_heads=lambda parallel: heads
        )
        self.builder: Any = XFormersBackend.get_builder_cls()(
            FullAttentionSpec(
                block_size=block_size, num_kv_heads=kv_heads, head_size=dim, dtype=dtype
            ),
            ["layer"],
            SimpleNamespace(model_config=model, parallel_config=None),  # type: ignore[arg-type]
            device,
        )
        self.impl: Any = object.__new__(XFormersBackend.get_impl_cls())
        self.impl.__init__(heads, dim, SCALE, kv_heads)
        sizes = (num_blocks, block_size, kv_heads, 2 * dim)
        self.kv_cache = torch.full(sizes, NAN, dtype=dtype, device=device).transpose(1, 2)

    def random(self, generator: torch.Generator, *sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator).to(self.dtype).to(self.device)

    def write(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        self.impl.do_kv_cache_update(self, keys, values, self.kv_cache, slots.to(self.device))

    def metadata(self, requests: list[tuple[int, list[int], int]]) -> Any:
        """Of requests, each its length, its blocks and its number of rows."""
        lengths, tables, rows = zip(*requests, strict=True)
        starts = torch.tensor([0, *rows]).cumsum(0).int()
        longest = max(map(len, tables))
        padded = [[*table, *[0] * (longest - len(table))] for table in tables]
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=self.device),
            seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
            num_reqs=len(requests),
            num_actual_tokens=sum(rows),
            max_query_len=max(rows),
            max_seq_len=max(lengths),
            block_table_tensor=torch.tensor(padded, dtype=torch.int32, device=self.device),
            slot_mapping=torch.empty(0, dtype=torch.int64),
            causal=False,
        )
        return self.builder.build(common_prefix_len=0, common_attn_metadata=common)

    def attend(self, queries: torch.Tensor, metadata: Any, filled_up: int = 0) -> torch.Tensor:
        nobodys = torch.full_like(queries[:1], NAN).expand(filled_up, -1, -1)
        queries = torch.cat([queries, nobodys])
        output = torch.zeros_like(queries)
        self.impl.forward(self, queries, None, None, self.kv_cache, metadata, output)
        return output


def blocks_of(lengths: list[int], block_size: int, num_blocks: int, seed: int) -> list[list[int]]:
    """Scattered, without vLLM's null block."""
    free = list(range(1, num_blocks))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in lengths]


SHAPES: dict[str, dict[str, Any]] = {
    "mha": dict(heads=3, kv_heads=3, dim=32, block_size=16),
    "gqa": dict(heads=4, kv_heads=2, dim=64, block_size=32),
    "gqa-7": dict(heads=14, kv_heads=2, dim=16, block_size=16),
    "one-kv-head": dict(heads=4, kv_heads=1, dim=32, block_size=64, num_blocks=16),
    "block-48": dict(heads=2, kv_heads=2, dim=16, block_size=48, num_blocks=16),
    "head-128": dict(heads=2, kv_heads=2, dim=128, block_size=32),
}
# Ragged: one row, one key, whole canvases, a last block full and nearly empty.
REQUESTS = [(1, 1), (70, 9), (64, 64), (33, 1), (97, 97), (48, 17)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_naive_attention(shape: str, dtype: str, device: torch.device) -> None:
    """Rows of a request in many pieces, over a cache that is NaN where nobody wrote."""
    if device.type == "cuda" and dtype == "f32":
        pytest.skip("xformers' kernel rounds float32 on GPUs; the backend refuses it there")
    layer = Layer(device, dtype=DTYPES[dtype], **SHAPES[shape])
    generator = torch.Generator().manual_seed(1)
    lengths = [length for length, _ in REQUESTS]
    num_blocks, size = layer.kv_cache.shape[0], layer.block_size
    tables = blocks_of(lengths, size, num_blocks, seed=2)
    expected, queries = [], []
    for (length, rows), table in zip(REQUESTS, tables, strict=True):
        keys, values = (
            layer.random(generator, length, layer.num_kv_heads, layer.head_size) for _ in range(2)
        )
        at = torch.arange(length)
        layer.write(keys, values, torch.tensor(table)[at // size] * size + at % size)
        queries.append(layer.random(generator, rows, layer.heads, layer.head_size))
        shares = naive.attention(queries[-1][None].cpu(), keys.permute(1, 2, 0)[None].cpu(), SCALE)
        group = layer.heads // layer.num_kv_heads
        every = values.cpu().float().repeat_interleave(group, dim=1)
        expected.append(torch.einsum("hrt,thd->rhd", shares[0], every))
    metadata = layer.metadata(
        [(n, table, rows) for (n, rows), table in zip(REQUESTS, tables, strict=True)]
    )
    wanted = torch.cat(expected)
    output = layer.attend(torch.cat(queries), metadata, filled_up=3)
    torch.testing.assert_close(
        output[: len(wanted)].cpu().float(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    assert not output[len(wanted) :].any(), "rows of no request are to be left as they were"


def test_a_row_is_the_same_in_any_batch(device: torch.device) -> None:
    """Bit by bit: an answer would else depend on who asks beside."""
    if xformers_backend.operator() is xformers_stand_in:
        pytest.skip("torch's products round by the number of rows")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    layer = Layer(device, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    tables = blocks_of([200, 33, 90], 16, 40, seed=4)
    for table in tables:
        slots = (torch.tensor(table)[:, None] * 16 + torch.arange(16)).flatten()
        keys, values = (layer.random(generator, len(slots), 2, 32) for _ in range(2))
        layer.write(keys, values, slots)
    queries = layer.random(generator, 40, 4, 32)
    alone = layer.attend(queries[:7], layer.metadata([(90, tables[2], 7)]))
    one = layer.attend(queries[:1], layer.metadata([(90, tables[2], 1)]))
    among = [(200, tables[0], 33), (90, tables[2], 7)]
    together = layer.attend(torch.cat([queries[7:], queries[:7]]), layer.metadata(among))
    assert torch.equal(together[33:], alone)
    assert torch.equal(one, alone[:1])


def test_one_compilation_serves_all_passes(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Triton compiles a kernel for, and what it tells apart, is the same in all of them."""
    if xformers_backend.operator() is xformers_stand_in:
        pytest.skip("the stand-in compiles nothing")
    from vllm_elastic.attention import paged_xformers

    compiled_for: list[dict[str, Any]] = []
    get_kernel = paged_xformers.FwOp.get_kernel

    class Noted:
        def __getitem__(self, grid: Any) -> Any:
            def launch(**arguments: Any) -> None:
                compiled_for.append({name: apart(name, arguments[name]) for name in arguments})
                get_kernel()[grid](**arguments)

            return launch

    def apart(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if name.startswith("stride_") and value not in (None, 1):
            return value % 16 == 0
        return None if name == "sm_scale" else value

    monkeypatch.setattr(paged_xformers.FwOp, "get_kernel", Noted)
    layer = Layer(device, dtype=torch.float16)  # compiles when it is made
    layer.kv_cache.zero_()
    generator = torch.Generator().manual_seed(5)
    for requests in (
        [(1, [1], 1)],
        [(17, [1, 2], 9)],
        [(70, [1, 2, 3, 4, 5], 70), (33, [6, 7, 8], 5), (16, [9], 16)],
        [(290, list(range(1, 20)), 290)],
    ):
        rows = sum(each for *_, each in requests)
        layer.attend(layer.random(generator, rows, 4, 32), layer.metadata(requests), rows % 5)
    assert len(compiled_for) == 5
    for each in compiled_for[1:]:
        assert each == compiled_for[0]


def test_rows_are_cut_into_pieces_of_their_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row would look at another request's keys, or at none."""
    monkeypatch.setattr(xformers_backend, "operator", lambda: xformers_stand_in)
    layer = Layer(torch.device("cpu"))
    draw = random.Random(6)
    for _ in range(50):
        requests = [
            (draw.randint(1, 290), draw.sample(range(1, 40), draw.randint(1, 19)), rows)
            for rows in (draw.choice([1, 2, 3, 4, 6, 7, 50]) for _ in range(draw.randint(1, 6)))
        ]
        metadata = layer.metadata(requests)
        mask = metadata.mask
        assert max(mask.rows) <= xformers_stand_in.most_rows(group=2)
        assert metadata.num_rows == sum(mask.rows)
        of_rows = [
            (length, table)
            for rows, length, table in zip(
                mask.rows, mask.lengths, mask.tables.tolist(), strict=True
            )
            for _ in range(rows)
        ]
        wanted = [(length, table) for length, table, rows in requests for _ in range(rows)]
        assert len(of_rows) == len(wanted)
        for (length, table), (its_length, its_table) in zip(of_rows, wanted, strict=True):
            assert length == its_length and table[: len(its_table)] == its_table


def test_keys_lie_as_gpu_statistics_read_them_fastest(device: torch.device) -> None:
    layer = Layer(device, block_size=32)
    layout = KeyLayout.measure(layer)
    assert layout.plain and layout.block_size == 32
    assert not layer.kv_cache[0].any() and layer.kv_cache[1:].isnan().all()
    generator = torch.Generator().manual_seed(7)
    keys = layer.random(generator, 5, 2, 32)
    slots = torch.tensor([35, 64, 100, 32, 1279])
    layer.write(keys, torch.full_like(keys, NAN), slots)
    assert torch.equal(layout.read_slots(layer.kv_cache, slots.to(device)), keys)


def test_a_cache_that_xformers_cannot_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "operator", lambda: xformers_stand_in)
    layer = Layer(torch.device("cpu"))
    layer.kv_cache = layer.kv_cache.contiguous()  # heads before slots
    with pytest.raises(RuntimeError, match="layout LBNHC; unset VLLM_KV_CACHE_LAYOUT"):
        KeyLayout.measure(layer)


def test_a_causal_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_backend, "operator", lambda: xformers_stand_in)
    layer = Layer(torch.device("cpu"))
    with pytest.raises(ValueError, match="--attention-backend CUSTOM attends both ways"):
        layer.builder.build(0, SimpleNamespace(causal=True))


def test_an_operator_that_does_not_run_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise TypeError("no block pointers")

    broken = SimpleNamespace(**vars(xformers_stand_in) | {"attend": fails})
    monkeypatch.setattr(xformers_backend, "operator", lambda: broken)
    with pytest.raises(RuntimeError, match=r"CUSTOM: .* does not run here: no block pointers"):
        Layer(torch.device("cpu"))


@pytest.mark.parametrize("option", [{"alibi_slopes": [1.0]}, {"sliding_window": 4}])
def test_other_attention_is_refused(option: dict[str, Any]) -> None:
    impl: Any = object.__new__(XFormersBackend.get_impl_cls())
    with pytest.raises(NotImplementedError, match="CUSTOM has no ALiBi"):
        impl.__init__(4, 32, SCALE, 2, **option)


GOOD: dict[str, Any] = dict(
    head_size=128,
    dtype=torch.bfloat16,
    kv_cache_dtype="auto",
    block_size=32,
    use_mla=False,
    has_sink=False,
    use_sparse=False,
    use_mm_prefix=False,
    use_per_head_quant_scales=False,
    device_capability=DeviceCapability(8, 0),
    attn_type="decoder",
    use_non_causal=True,
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"device_capability": DeviceCapability(9, 0), "use_batch_invariant": True}, None),
        ({"device_capability": DeviceCapability(7, 5)}, "compute capability"),
        ({"dtype": torch.float32}, "dtype"),
        ({"head_size": 80}, "head_size"),
        ({"block_size": 24}, "block_size"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"use_non_causal": False}, "models of vllm_elastic"),
        ({"has_sliding_window": True}, "sliding window"),
    ],
    ids=str,
)
def test_what_vllm_refuses_at_start(
    change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(xformers_backend, "missing", lambda: None)
    reasons = XFormersBackend.validate_configuration(**GOOD | change)
    if reason is None:
        assert not reasons
    else:
        assert len(reasons) == 1 and reason in reasons[0]


@pytest.mark.parametrize(
    ("installed", "reason"),
    [
        ({"xformers": "0.0.35", "triton": "3.8.0"}, None),
        ({"xformers": "0.0.35+cu130", "triton": "3.7.1"}, None),
        ({"triton": "3.8.0"}, r"xformers is not installed: pip install 'vllm-elastic\[xformers\]'"),
        ({"xformers": "0.0.36", "triton": "3.8.0"}, "xformers 0.0.36 is not known to work"),
        ({"xformers": "0.0.35", "triton": "3.10.1"}, r"not run with Triton 3.10.1, .* before 3.9"),
    ],
    ids=str,
)
def test_what_is_missing_is_said(
    installed: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise xformers_backend.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(xformers_backend, "version", version)
    reasons = XFormersBackend.validate_configuration(**GOOD)
    if reason is None:
        assert not reasons
    else:
        assert len(reasons) == 1
        assert re.search(reason, reasons[0])


def test_another_plugins_backend_is_left() -> None:
    from vllm_elastic.plugin import register

    custom = AttentionBackendEnum.CUSTOM
    register()
    assert custom.get_class() is XFormersBackend
    custom.clear_override()
    register_backend(custom, "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend")
    register()
    assert custom.get_path().endswith("TritonAttentionBackend")
    custom.clear_override()
    register()
    assert custom.get_class() is XFormersBackend
