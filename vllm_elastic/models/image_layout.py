# SPDX-License-Identifier: Apache-2.0
"""How an image is cut into tiles, and how many canvas positions it becomes. Arithmetic only.

The rules are LLaDA-V's (``llava_arch.py``, ``mm_utils.py``: anyres_max_N, spatial_unpad, a newline
after each row). The whole image, squashed into one tile, comes first; then the image on a grid of
tiles, whose black borders are cut off again and which is made smaller where it has many patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers.image_processing_utils import select_best_resolution

SHRINK_ABOVE = 1.1
"""LLaDA-V's: a grid of up to 1.1 times the side that N tiles have stays as it is."""


@dataclass(frozen=True, slots=True)
class ImageLayout:
    """One image on the canvas, in patches.

    Attributes:
        tile_rows, tile_columns: the grid of tiles.
        top, left: patches that are cut off at either end, the borders.
        height, width: of the grid that enters the canvas, borders cut off and made smaller.
        overview: patches of the first tile, the whole image.
    """

    tile_rows: int
    tile_columns: int
    top: int
    left: int
    height: int
    width: int
    overview: int

    @property
    def num_positions(self) -> int:
        """Canvas positions: the overview, then each row with its newline."""
        return self.overview + self.height * (self.width + 1)


@dataclass(frozen=True)
class ImageRules:
    """What a checkpoint says of images.

    Attributes:
        tile: pixels of a tile's side; patches: the same in patches.
        grids: (height, width) in pixels, multiples of ``tile``, to choose from.
        max_tiles: N of anyres_max_N: a grid of more patches than N tiles have is made smaller.
    """

    tile: int
    patches: int
    grids: tuple[tuple[int, int], ...]
    max_tiles: int

    def layout(self, height: int, width: int) -> ImageLayout:
        """The layout of an image of so many pixels.

        Raises:
            ValueError: it is so long and narrow that nothing of it would be left.
        """
        grid_height, grid_width = select_best_resolution((height, width), list(self.grids))
        rows, columns = grid_height // self.tile, grid_width // self.tile
        high, wide = rows * self.patches, columns * self.patches
        top = left = 0
        if width / height > wide / high:
            top = (high - int(height * (wide / width))) // 2
        else:
            left = (wide - int(width * (high / height))) // 2
        high, wide = high - 2 * top, wide - 2 * left
        excess = math.sqrt(high * wide / (self.max_tiles * self.patches**2))
        if excess > SHRINK_ABOVE:
            high, wide = int(high // excess), int(wide // excess)
        if not high or not wide:
            raise ValueError(
                f"an image of {width} x {height} pixels is too long and narrow: scaled to the "
                f"model's tiles of {self.tile} pixels nothing is left of it; crop or pad it."
            )
        return ImageLayout(rows, columns, top, left, high, wide, self.patches**2)

    @property
    def padded_positions(self) -> int:
        """Canvas positions of an image among several: one tile and a newline."""
        return self.patches**2 + 1

    @property
    def most_positions(self) -> int:
        """No image takes more canvas positions than this; an upper bound, hardly ever met."""
        patches = SHRINK_ABOVE**2 * self.max_tiles * self.patches**2
        newlines = self.patches * max(height for height, _ in self.grids) // self.tile
        return self.patches**2 + int(patches) + newlines

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest grid, and the overview."""
        return 1 + max(height * width for height, width in self.grids) // self.tile**2
