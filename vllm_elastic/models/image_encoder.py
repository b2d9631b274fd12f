# SPDX-License-Identifier: Apache-2.0
"""From an image's tiles to rows of the language model: vision tower, projector, newlines."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.siglip import SiglipVisionModel
from vllm.model_executor.models.utils import AutoWeightsLoader

from vllm_elastic.models.image_layout import ImageRules
from vllm_elastic.models.llada_v_config import LLaDAVConfig

TILES_AT_ONCE = 4
"""Tiles that the tower works on at a time: its peak does not grow with the image. Tiles of two
images are never mixed, so an image's features do not depend on what else is asked."""


class ImageEncoder(nn.Module):
    """LLaDA-V's: a SigLIP without its last layer and norm, a projector of two layers, newlines.

    Attributes:
        rules: how images are cut.
    """

    def __init__(self, vllm_config: VllmConfig, config: LLaDAVConfig, prefix: str) -> None:
        super().__init__()
        vision, width = config.vision_config, config.d_model
        self.rules: ImageRules = config.image_rules()
        self.vision_tower = SiglipVisionModel(
            vision,
            vllm_config.quant_config,
            num_hidden_layers_override=vision.num_hidden_layers - 1,
            require_post_norm=False,
            prefix=f"{prefix}.vision_tower",
        )
        self.projector_in = nn.Linear(vision.hidden_size, width)
        self.projector_out = nn.Linear(width, width)
        self.newline = nn.Parameter(torch.empty(width))

    def forward(self, tiles: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Rows [positions, d] of one image.

        Args:
            tiles: [tiles, 3, side, side], the whole image first; it alone: an image among several.
            height, width: of the image, in pixels.
        """
        tiles = tiles.to(self.newline)
        features = torch.cat([self._project(some) for some in tiles.split(TILES_AT_ONCE)])
        overview, rest = features[0], features[1:]
        if not len(rest):
            return torch.cat([overview, self.newline[None]])
        layout, side = self.rules.layout(height, width), self.rules.patches
        rows, columns = layout.tile_rows, layout.tile_columns
        grid = rest.view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3)
        grid = grid.reshape(-1, rows * side, columns * side)
        grid = grid[
            :,
            layout.top : rows * side - layout.top,
            layout.left : columns * side - layout.left,
        ]
        size = layout.height, layout.width
        if grid.shape[1:] != size:
            grid = F.interpolate(grid[None], size, mode="bilinear")[0]
        newlines = self.newline[:, None, None].expand(-1, layout.height, 1)
        return torch.cat([overview, torch.cat([grid, newlines], dim=-1).flatten(1).T])

    def _project(self, tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, patches, d] of tiles [tiles, 3, side, side]."""
        return self.projector_out(F.gelu(self.projector_in(self.vision_tower(tiles))))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors by this module's own names; returns the parameters that were filled."""
        return AutoWeightsLoader(self).load_weights(weights)
