# SPDX-License-Identifier: Apache-2.0
"""Where an attention backend keeps the keys inside a KV block, found out by writing to one.

Backends pack keys as their kernels like them ([D, block] on most CPUs, interleaved pairs for AMX,
[block, D] on GPUs). The attention statistics read keys back, so instead of a table of layouts per
backend and instruction set, the layout is measured once on the null block, which no request owns.
"""

from __future__ import annotations

from typing import Any

import torch

_CODE_BASE = 128
"""Digits of the codes written; bfloat16 holds integers up to 256 exactly."""


class KeyLayout:
    """Reads keys of any block or slot of one layer's paged cache.

    Attributes:
        offsets: int64 [D, block_size], offset of (dimension, slot) inside a (block, head) plane.
        tile, pack: the plane is [block/tile, D/pack, tile, pack] (tile = block size and pack = 1
            for plain transposed keys, 16 and 2 for AMX), or both 0: read element by element.
    """

    def __init__(self, offsets: torch.Tensor) -> None:
        self.offsets = offsets
        self.head_dim, self.block_size = offsets.shape
        self.tile, self.pack = self._find_tiling()
        self._flat_offsets = offsets.reshape(-1)

    @property
    def name(self) -> str:
        """For the log: how keys lie in a (block, head) plane."""
        if not self.tile:
            return "scattered"
        return f"[block/{self.tile}, D/{self.pack}, {self.tile}, {self.pack}]"

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
        for digit, scale in ((codes % _CODE_BASE, 1), (codes // _CODE_BASE, _CODE_BASE)):
            key = (digit + 1).to(cache.dtype).expand(-1, heads, -1).contiguous()
            attn.impl.do_kv_cache_update(attn, key, torch.zeros_like(key), cache, slots)
            plane = cache[0, 0].reshape(-1).to(torch.int64)
            seen = plane > 0
            found += (plane - 1).clamp_min(0) * scale
        cache[0].zero_()
        where = torch.nonzero(seen).flatten()
        if count > _CODE_BASE**2 or where.numel() != count:
            raise RuntimeError(f"cannot read keys of {type(attn.impl).__name__}'s KV cache")
        offsets = torch.empty(count, dtype=torch.int64, device=cache.device)
        offsets[found[where]] = where
        if offsets.unique().numel() != count:
            raise RuntimeError(f"cannot read keys of {type(attn.impl).__name__}'s KV cache")
        return cls(offsets.view(block_size, dim).t().contiguous())

    def read_blocks(self, planes: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of whole blocks, transposed for a score product.

        Args:
            planes: [..., blocks, Hkv, plane], see ``planes``.
            blocks: int64 [B].

        Returns:
            [..., Hkv, D, B * block_size], in slot order.
        """
        if not self.tile:
            chosen = planes.index_select(-3, blocks)[..., self._flat_offsets]
            chosen = chosen.unflatten(-1, (self.head_dim, self.block_size))
            return chosen.movedim(-4, -2).flatten(-2)
        tiles = (self.block_size // self.tile, self.head_dim // self.pack, self.tile, self.pack)
        view = planes[..., : self.head_dim * self.block_size].unflatten(-1, tiles)
        # [..., blocks, Hkv, tiles, D/pack, tile, pack] -> [..., Hkv, D/pack, pack, blocks, ...]
        view = view.movedim((-4, -1, -6), (-2, -4, -3))
        return view.index_select(-3, blocks).flatten(-3).flatten(-3, -2)

    def read_slots(self, planes: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Keys [..., R, Hkv, D] of single slots int64 [R] of planes [..., blocks, Hkv, plane]."""
        block, offset = slots // self.block_size, slots % self.block_size
        heads = torch.arange(planes.shape[-2], device=planes.device)
        inside = self.offsets.t()[offset]  # [R, D]
        return planes[..., block[:, None, None], heads[None, :, None], inside[:, None, :]]

    @staticmethod
    def planes(cache: torch.Tensor) -> torch.Tensor:
        """A layer's cache [blocks, Hkv, block_size, C] as [blocks, Hkv, plane]."""
        return cache.flatten(-2)

    def _find_tiling(self) -> tuple[int, int]:
        """(tile, pack) if the plane is [block/tile, D/pack, tile, pack], else (0, 0)."""
        dim = torch.arange(self.head_dim, device=self.offsets.device)[:, None]
        slot = torch.arange(self.block_size, device=self.offsets.device)[None]
        for tile in (self.block_size, 32, 16):
            for pack in (1, 2, 4):
                if self.block_size % tile or self.head_dim % pack:
                    continue
                tiled = (slot // tile) * (self.head_dim * tile) + (slot % tile) * pack
                if torch.equal(tiled + (dim // pack) * (tile * pack) + dim % pack, self.offsets):
                    return tile, pack
        return 0, 0
