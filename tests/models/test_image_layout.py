# SPDX-License-Identifier: Apache-2.0
"""How many positions an image takes, against LLaDA-V's rules as others wrote them."""

from __future__ import annotations

import random

import pytest
import torch

from tests.tiny_llada_v import TinyLLaDAV
from vllm_elastic.models.llada_v_config import LLaDAVConfig

RULES = LLaDAVConfig().image_rules()


@pytest.mark.parametrize(
    ("width", "height", "positions"),
    [
        # Worked out with LLaDA-V's own code for the released model.
        (336, 336, 1485),
        (640, 480, 2929),
        (1024, 768, 3627),
        (1920, 1080, 3649),
        (3000, 2000, 3677),
        (368, 1746, 4341),
    ],
)
def test_positions_of_the_released_model(width: int, height: int, positions: int) -> None:
    assert RULES.layout(height, width).num_positions == positions


def test_positions_are_what_transformers_packs() -> None:
    """Random sizes; features of one number, so that packing them costs nothing."""
    from types import SimpleNamespace

    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=384, patch_size=14),
        image_grid_pinpoints=[list(grid) for grid in RULES.grids],
    )
    draw = random.Random(4)
    for _ in range(150):
        height, width = (int(2 ** draw.uniform(6, 11.5)) for _ in range(2))
        layout = RULES.layout(height, width)
        tiles = torch.zeros(1 + layout.tile_rows * layout.tile_columns, RULES.patches**2, 1)
        packed, _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=config),
            [tiles],
            torch.tensor([[height, width]]),
            image_newline=torch.zeros(1),
            vision_aspect_ratio="anyres_max_4",
        )
        assert len(packed[0]) == layout.num_positions <= RULES.most_positions, (height, width)
        assert len(tiles) <= RULES.most_tiles == 37


def test_what_is_left_of_a_line() -> None:
    """Of an odd number of patches the middle one, of an even number none: an error that says so."""
    assert RULES.layout(3, 4000).height == 1
    rules = LLaDAVConfig(**TinyLLaDAV().config_json()).image_rules()
    with pytest.raises(ValueError, match=r"4000 x 3 pixels is too long and narrow.*crop or pad it"):
        rules.layout(3, 4000)


def test_several_images_are_a_tile_each() -> None:
    assert RULES.padded_positions == 730
