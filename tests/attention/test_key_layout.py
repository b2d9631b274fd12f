# SPDX-License-Identifier: Apache-2.0
"""Reading keys back from the paged cache of vLLM's CPU backend, and of backends made up here."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

from vllm_elastic.attention.key_layout import KeyLayout

torch.set_num_threads(1)

NUM_LAYERS, NUM_BLOCKS, NUM_HEADS = 2, 6, 3
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
NAN = float("nan")


on_cpu_builds = pytest.mark.skipif(
    not hasattr(torch.ops._C, "cpu_attn_reshape_and_cache"), reason="a vLLM without CPU kernels"
)


def cpu_impl() -> Any:
    """The real implementation, without the engine configuration that its constructor asks for."""
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type = "decoder"
    impl.kv_cache_dtype = "auto"
    return impl


def make_caches(
    dtype: torch.dtype, head_size: int, block_size: int, heads_first: bool = True
) -> torch.Tensor:
    """[L, blocks, Hkv, block_size, 2 * D] of NaN; in memory, heads or slots come first."""
    shape = (NUM_LAYERS, NUM_BLOCKS, NUM_HEADS, block_size, 2 * head_size)
    if heads_first:
        return torch.full(shape, NAN, dtype=dtype)
    swapped = (NUM_LAYERS, NUM_BLOCKS, block_size, NUM_HEADS, 2 * head_size)
    return torch.full(swapped, NAN, dtype=dtype).transpose(2, 3)


def make_layer(impl: Any, cache: torch.Tensor, isa: str = "") -> Any:
    """An attention layer as KeyLayout and the backend see it."""
    return SimpleNamespace(
        kv_cache=cache,
        num_kv_heads=NUM_HEADS,
        head_size=cache.shape[-1] // 2,
        impl=impl,
        isa=isa,
        _k_scale_float=1.0,
        _v_scale_float=1.0,
    )


def write_keys(layer: Any, keys: torch.Tensor, slots: torch.Tensor) -> None:
    """Keys [R, Hkv, D] to slots [R]; the values written are NaN: whoever reads one is found out."""
    layer.impl.do_kv_cache_update(
        layer, keys.contiguous(), torch.full_like(keys, NAN), layer.kv_cache, slots
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def check_reads(impl: Any, caches: torch.Tensor, isa: str = "", seed: int = 0) -> KeyLayout:
    """Write random keys to every slot in random order, then read blocks and slots back."""
    layers = [make_layer(impl, cache, isa) for cache in caches]
    layout = KeyLayout.measure(layers[0])
    assert not caches[0, 0].any(), "the null block is to be left zeroed"
    assert caches[0, 1:].isnan().all(), "measuring wrote outside the null block"
    block_size, head_size = caches.shape[3], layers[0].head_size
    assert (layout.head_dim, layout.block_size) == (head_size, block_size)
    num_slots = NUM_BLOCKS * block_size
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(NUM_LAYERS, num_slots, NUM_HEADS, head_size, generator=generator)
    keys = keys.to(caches.dtype)
    for layer, own in zip(layers, keys, strict=True):
        for slots in torch.randperm(num_slots, generator=generator).split(num_slots // 3 + 1):
            write_keys(layer, own[slots], slots)
    before = caches.clone()

    scattered = torch.randperm(NUM_BLOCKS, generator=generator)[:4]
    blocks = torch.cat([scattered, torch.tensor([2, 3, 4, 1])])  # with a run among them
    by_block = keys.view(NUM_LAYERS, NUM_BLOCKS, block_size, NUM_HEADS, head_size)[:, blocks]
    expected = by_block.permute(0, 3, 4, 1, 2).reshape(NUM_LAYERS, NUM_HEADS, head_size, -1)
    # A replay reads from its first layer on; canvases have different numbers of blocks.
    for first_layer in (0, 1):
        tables = [blocks[:1].tolist(), blocks.tolist(), blocks[2:5].tolist()]
        longest = max(map(len, tables))
        index = torch.tensor([[*own, *[0] * (longest - len(own))] for own in tables])
        read = layout.read_blocks(caches[first_layer:], tables, index)
        assert read.shape == (NUM_LAYERS - first_layer, 3, *expected.shape[1:])
        assert read.dtype == torch.float32
        for nth, (start, stop) in enumerate([(0, 1), (0, len(blocks)), (2, 5)]):
            part = expected[first_layer:, ..., start * block_size : stop * block_size].float()
            assert torch.equal(read[:, nth, ..., : part.shape[-1]], part)

    slots = torch.randint(num_slots, (17,), generator=generator)
    assert torch.equal(layout.read_slots(caches, slots), keys[:, slots])
    assert torch.equal(layout.read_slots(caches[1], slots), keys[1, slots])
    none = torch.empty(0, dtype=torch.int64)
    assert layout.read_slots(caches, none).shape == (NUM_LAYERS, 0, NUM_HEADS, head_size)
    same = torch.equal(as_bytes(caches), as_bytes(before))  # NaN == NaN here
    assert same, "reading wrote"
    return layout


@on_cpu_builds
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_are_read_back_as_vllm_stores_them(
    dtype: str, head_size: int, block_size: int
) -> None:
    """Statistics would be computed from the wrong keys on this machine."""
    isa = _get_attn_isa(DTYPES[dtype], block_size, head_size)
    check_reads(cpu_impl(), make_caches(DTYPES[dtype], head_size, block_size), isa)


@on_cpu_builds
@pytest.mark.parametrize(
    ("isa", "dtype", "head_size", "block_size", "tiling"),
    [
        ("vec", "f32", 64, 32, (32, 1)),
        ("vec", "bf16", 32, 32, (32, 1)),
        ("vec", "bf16", 128, 128, (128, 1)),
        ("vec16", "f32", 80, 32, (32, 1)),
        ("vec16", "bf16", 112, 32, (32, 1)),
        ("amx", "bf16", 64, 32, (16, 2)),
        ("amx", "bf16", 128, 128, (16, 2)),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_instruction_sets(
    isa: str, dtype: str, head_size: int, block_size: int, tiling: tuple[int, int]
) -> None:
    """Another machine's layout would be misread, or be read element by element."""
    if isa == "amx" and not torch.cpu._is_amx_tile_supported():
        pytest.skip("this CPU has no AMX")
    layout = check_reads(cpu_impl(), make_caches(DTYPES[dtype], head_size, block_size), isa)
    assert (layout.tile, layout.pack) == tiling


class MadeUpBackend:
    """Stores key elements where ``offset_of`` [block_size, D] says, values in what is left."""

    def __init__(self, offset_of: torch.Tensor) -> None:
        self.offset_of = offset_of

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        block_size, width = kv_cache.shape[-2:]
        mine = torch.zeros(block_size * width, dtype=torch.bool)
        mine[self.offset_of.flatten()] = True
        rest = torch.nonzero(~mine).view(block_size, -1)
        for row, slot in enumerate(slots.tolist()):
            block, offset = divmod(slot, block_size)
            for places, data in ((self.offset_of[offset], key), (rest[offset], value)):
                kv_cache[block][:, places // width, places % width] = data[row]


def offsets(kind: str, head_size: int, block_size: int) -> torch.Tensor:
    """[block_size, D] places of the key elements in a plane of 2 * block_size * D."""
    slot = torch.arange(block_size)[:, None]
    dim = torch.arange(head_size)[None, :]
    if kind == "gpu-plain":
        return slot * head_size + dim
    if kind == "gpu-keys-beside-values":
        return slot * 2 * head_size + dim
    if kind == "keys-behind-values":
        return (block_size + slot) * head_size + dim
    if kind.startswith("tiles"):  # [block/tile, D/pack, tile, pack]
        tile, pack = map(int, kind.split("-")[1:])
        place = torch.arange(block_size * head_size)
        place = place.view(block_size // tile, head_size // pack, tile, pack)
        return place.permute(0, 2, 1, 3).reshape(block_size, head_size)
    assert kind == "shuffled"
    places = torch.randperm(2 * block_size * head_size, generator=torch.Generator().manual_seed(3))
    return places[: block_size * head_size].view(block_size, head_size)


SCATTERED = (0, 0)
TILINGS = {  # tile, pack
    "gpu-plain": SCATTERED,
    "gpu-keys-beside-values": SCATTERED,
    "keys-behind-values": SCATTERED,
    "shuffled": SCATTERED,
    "tiles-64-1": (64, 1),
    "tiles-64-2": (64, 2),
    "tiles-32-1": (32, 1),
    "tiles-16-2": (16, 2),
    "tiles-16-4": (16, 4),
    "tiles-8-2": SCATTERED,
}


@pytest.mark.parametrize("kind", TILINGS)
@pytest.mark.parametrize("heads_first", [True, False], ids=["heads-first", "slots-first"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_of_other_backends(kind: str, heads_first: bool, dtype: str) -> None:
    """A layout nobody has thought of would be misread instead of learnt."""
    impl = MadeUpBackend(offsets(kind, 16, 64))
    layout = check_reads(impl, make_caches(DTYPES[dtype], 16, 64, heads_first))
    assert (layout.tile, layout.pack) == TILINGS[kind]
    assert layout.plain == (kind == "gpu-keys-beside-values")


@pytest.mark.parametrize("block_size", [128, 256])
def test_large_blocks(block_size: int) -> None:
    """Codes of two digits would run out."""
    impl = MadeUpBackend(offsets("shuffled", block_size, 128))
    layout = KeyLayout.measure(make_layer(impl, make_caches(torch.bfloat16, block_size, 128)[0]))
    assert torch.equal(layout.offsets.t(), impl.offset_of)


class Halved(MadeUpBackend):
    """Stores something else than the key that it is given."""

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, *rest: Any
    ) -> None:
        super().do_kv_cache_update(layer, *self.spoil(key, value), *rest)

    def spoil(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (key / 2).floor(), value


class Doubled(Halved):
    def spoil(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key * 2, value


class WithAHole(Halved):
    def spoil(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key.index_fill(-1, torch.tensor(5), 0), value


class StoredTwice(Halved):
    def spoil(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return key, key


class OneForAnother(Halved):
    def spoil(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = key.clone()
        key[0, :, 5] = key[0, :, 6]
        return key, value


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` fills what it returns with NaN, or with the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("backend", [Halved, Doubled, WithAHole, StoredTwice, OneForAnother])
def test_a_backend_that_stores_other_keys_is_refused(backend: type[Halved]) -> None:
    """Statistics of keys that are scaled, rotated or rounded when stored would be noise."""
    impl = backend(offsets("gpu-plain", 16, 8))
    with pytest.raises(RuntimeError, match=f"cannot read keys of {backend.__name__}"):
        KeyLayout.measure(make_layer(impl, make_caches(torch.float32, 16, 8)[0]))
