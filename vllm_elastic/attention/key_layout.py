# SPDX-License-Identifier: Apache-2.0
"""Where an attention backend keeps the keys inside a KV block, found out by writing to one.

Backends pack keys as their kernels like them ([D, block] on most CPUs, interleaved pairs for AMX,
[block, D] on GPUs). The attention statistics read keys back, so instead of a table of layouts per
backend and instruction set, the layout is measured once on the null block, which no request owns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

_CODE_BASE = 128
"""Digits of the codes written; bfloat16 holds integers up to 256 exactly."""

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""What moves ``pack`` numbers at once, by their bytes."""


class KeyLayout:
    """Reads keys of any block or slot of a paged cache [..., blocks, Hkv, block_size, C].

    Attributes:
        offsets: int64 [D, block_size], offset of (dimension, slot) in a (block, head) plane of
            block_size * C elements.
        tile, pack: the plane begins with keys as [block/tile, D/pack, tile, pack] (CPU: tile =
            block size and pack = 1; AMX: 16 and 2); both 0 where keys are not tiled.
        plain: the plane is [block, C] with a slot's key first in its row (GPU).
    """

    def __init__(self, offsets: torch.Tensor, row_width: int) -> None:
        self.offsets = offsets
        self.row_width = row_width
        self.head_dim, self.block_size = offsets.shape
        dim = torch.arange(self.head_dim, device=offsets.device)[:, None]
        slot = torch.arange(self.block_size, device=offsets.device)[None]
        self.plain = torch.equal(slot * row_width + dim, offsets)
        self.tile, self.pack = self._find_tiling(dim, slot)

    @property
    def name(self) -> str:
        """For the log: how keys lie in a (block, head) plane."""
        if self.plain:
            return "[block, D]"
        if self.tile:
            return f"[block/{self.tile}, D/{self.pack}, {self.tile}, {self.pack}]"
        return "scattered"

    @classmethod
    def measure(cls, attn: Any) -> KeyLayout:
        """Write coded keys to the null block of a layer (vLLM's block 0) and look where they are.

        Raises:
            RuntimeError: the backend does not keep every key element exactly once in a
                (block, head) plane, so statistics cannot be read from its cache.
        """
        cache = attn.kv_cache  # [blocks, Hkv, block_size, C]
        block_size, heads, dim = cache.shape[2], attn.num_kv_heads, attn.head_size
        count = block_size * dim
        codes = torch.arange(count, device=cache.device).view(block_size, 1, dim)
        slots = torch.arange(block_size, device=cache.device, dtype=torch.int64)
        found = torch.zeros(cache[0, 0].numel(), dtype=torch.int64, device=cache.device)
        seen = torch.zeros_like(found, dtype=torch.bool)
        scale = 1
        while scale < count:
            digit = codes // scale % _CODE_BASE
            key = (digit + 1).to(cache.dtype).expand(-1, heads, -1).contiguous()
            attn.impl.do_kv_cache_update(attn, key, torch.zeros_like(key), cache, slots)
            plane = cache[0, 0].reshape(-1).to(torch.int64)
            seen = plane > 0
            found += (plane - 1).clamp_min(0) * scale
            scale *= _CODE_BASE
        cache[0].zero_()
        where = torch.nonzero(seen).flatten()
        readable = where.numel() == count
        expected = torch.arange(count, device=cache.device)
        if not readable or not torch.equal(found[where].sort().values, expected):
            raise RuntimeError(f"cannot read keys of {type(attn.impl).__name__}'s KV cache")
        offsets = torch.empty(count, dtype=torch.int64, device=cache.device)
        offsets[found[where]] = where
        return cls(offsets.view(block_size, dim).t().contiguous(), cache.shape[3])

    def read_blocks(
        self, cache: torch.Tensor, tables: Sequence[Sequence[int]], index: torch.Tensor
    ) -> torch.Tensor:
        """Keys of whole blocks of some canvases, transposed for a score product.

        Args:
            cache: [..., blocks, Hkv, block_size, C].
            tables: each canvas's blocks by their numbers, as the host knows them.
            index: int64 [canvases, B], the same on the device, filled up with any block.

        Returns:
            float32 [..., canvases, Hkv, D, B * block_size], in slot order, B of the canvas with
            the most blocks; anything at all behind the others' blocks.
        """
        if self.tile and self.pack == 1:
            return _copy_of_blocks(self._tiles(cache), tables, torch.float32).flatten(-3)
        if self.tile:
            # ``pack`` numbers move as one word.
            words = self._tiles(cache.view(_WORDS[self.pack * cache.element_size()]))
            moved = _copy_of_blocks(words, tables, words.dtype).flatten(-3)
            return self._unpacked(moved, cache.dtype)
        # By indexing: index_select takes a hundred times as long on a view with strides.
        if self.plain:
            view = cache[..., index, :, :, : self.head_dim]
            return _float_copy(view.movedim((-4, -2), (-2, -1))).flatten(-2)
        chosen = cache[..., index, :, :, :].flatten(-2)[..., self.offsets.reshape(-1)]
        chosen = chosen.unflatten(-1, (self.head_dim, self.block_size))
        return _float_copy(chosen.movedim(-4, -2)).flatten(-2)

    def read_slots(self, cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Keys [..., R, Hkv, D] of slots int64 [R] of a cache [..., blocks, Hkv, block_size, C]."""
        block, offset = slots // self.block_size, slots % self.block_size
        heads = torch.arange(cache.shape[-3], device=cache.device)
        inside = self.offsets.t()[offset][:, None]  # [R, 1, D]
        row, column = inside // self.row_width, inside % self.row_width
        # One offset an element instead of four indices: four times as fast.
        index = (block[:, None, None], heads[None, :, None], row, column)
        strides = cache.stride()[-4:]
        offsets = sum(i * stride for i, stride in zip(index, strides, strict=True))
        last = sum((n - 1) * stride for n, stride in zip(cache.shape[-4:], strides, strict=True))
        flat = cache.as_strided((*cache.shape[:-4], last + 1), (*cache.stride()[:-4], 1))
        return flat[..., offsets]

    def _tiles(self, words: torch.Tensor) -> torch.Tensor:
        """Tiled keys, a view: [..., Hkv, D/pack, blocks, block/tile, tile] words.

        Args:
            words: the cache [..., blocks, Hkv, block_size, C/pack] as words of ``pack`` numbers.
        """
        tiles = (self.block_size // self.tile, self.head_dim // self.pack, self.tile)
        keys = words.flatten(-2)[..., : self.head_dim * self.block_size // self.pack]
        # [..., blocks, Hkv, block/tile, D/pack, tile]
        return keys.unflatten(-1, tiles).movedim((-5, -3), (-3, -2))

    def _unpacked(self, words: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Words [..., D/pack, T] of numbers of a type: float32 [..., D, T]."""
        shape = (*words.shape[:-1], self.pack, words.shape[-1])
        numbers = torch.empty(shape, dtype=torch.float32, device=words.device)
        if dtype == torch.bfloat16 and self.pack == 2 and sys.byteorder == "little":
            # A bfloat16 is the upper half of a float32. Twice as fast as converting strided ones.
            halves = numbers.view(torch.int32)
            torch.bitwise_left_shift(words, 16, out=halves[..., 0, :])
            torch.bitwise_and(words, -(1 << 16), out=halves[..., 1, :])
        else:
            numbers.copy_(words.view(dtype).unflatten(-1, (-1, self.pack)).movedim(-1, -2))
        return numbers.flatten(-3, -2)

    def _find_tiling(self, dim: torch.Tensor, slot: torch.Tensor) -> tuple[int, int]:
        for tile in (self.block_size, 32, 16):
            for pack in (1, 2, 4):
                if self.block_size % tile or self.head_dim % pack:
                    continue
                tiled = (slot // tile) * (self.head_dim * tile) + (slot % tile) * pack
                if torch.equal(tiled + (dim // pack) * (tile * pack) + dim % pack, self.offsets):
                    return tile, pack
        return 0, 0


def _copy_of_blocks(
    tiles: torch.Tensor, tables: Sequence[Sequence[int]], dtype: torch.dtype
) -> torch.Tensor:
    """Blocks of a view [..., Hkv, D, blocks, X, Y] by canvas, contiguous, converted on the way.

    Run by run of consecutive blocks: gathering them by an index takes five times as long, and
    then they are still to be converted. vLLM mostly hands out runs.

    Returns:
        [..., canvases, Hkv, D, most blocks, X, Y].
    """
    *outer, heads, dim, _, x, y = tiles.shape
    shape = (*outer, len(tables), heads, dim, max(map(len, tables)), x, y)
    copy = torch.empty(shape, dtype=dtype, device=tiles.device)
    for nth, blocks in enumerate(tables):
        canvas = copy[..., nth, :, :, :, :, :]
        for start, stop in _runs(blocks):
            first = blocks[start]
            canvas[..., start:stop, :, :].copy_(tiles[..., first : first + stop - start, :, :])
    return copy


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each stretch in which every number is the one before it plus 1."""
    start = 0
    for stop in range(1, len(numbers) + 1):
        if stop == len(numbers) or numbers[stop] != numbers[stop - 1] + 1:
            yield start, stop
            start = stop


def _float_copy(view: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy, reordered and converted in one go."""
    return torch.empty(view.shape, dtype=torch.float32, device=view.device).copy_(view)
