# SPDX-License-Identifier: Apache-2.0
"""LLaDA-V's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

from transformers import SiglipVisionConfig

from vllm_elastic.models.config_options import refuse_options
from vllm_elastic.models.image_layout import ImageRules
from vllm_elastic.models.llada_config import LLaDAConfig

PLACEHOLDER = "<image>"
"""Where an image goes in a prompt's text."""

SIGLIP2_SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""siglip2-so400m-patch14-384, LLaDA-V's tower; config.json names it and has no sizes of it."""

_ONLY = {
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_scaling": (None,),
    "hidden_act": ("silu",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_newline_position": ("grid",),
    "mm_vision_select_layer": (-2,),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
}
"""Options that change what is computed, with what is computed here."""


class LLaDAVConfig(LLaDAConfig):
    """Keys of LLaDA-V's config.json: a text part in Llama's names, and ``mm_*``.

    Beyond the checkpoint's keys, with the released model's values as defaults: ``vision_config``
    (the tower's sizes), ``image_token_id`` (a reserved token that stands for an image's positions;
    LLaDA-V has none) and ``never_chosen_ids`` (what its sampler bans at masked positions: the ends
    of text and start, and the two header tokens).

    Raises:
        ValueError: an option that the released model does not use and that is not computed here.
    """

    model_type = "llava_llada"
    sub_configs = {"vision_config": SiglipVisionConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | SiglipVisionConfig | None = None,
        mm_vision_tower: str = "siglip2-so400m-patch14-384",
        image_aspect_ratio: str = "anyres_max_4",
        image_grid_pinpoints: str | list[list[int]] = "(1x1),(6x6)",
        image_token_id: int = 126084,
        never_chosen_ids: tuple[int, ...] | list[int] = (126081, 126080, 126346, 126347),
        **kwargs: Any,
    ) -> None:
        refuse_options("LLaDA-V", kwargs, _ONLY)
        if "siglip" not in mm_vision_tower.lower():
            raise ValueError(
                f"LLaDA-V config: mm_vision_tower={mm_vision_tower!r} is not supported, only a "
                "SigLIP of fixed resolution (siglip2-so400m-patch14-384)."
            )
        for theirs, ours in LLaDAConfig.attribute_map.items():
            if theirs in kwargs:
                kwargs[ours] = kwargs.pop(theirs)
        kwargs.setdefault("max_sequence_length", 16384)
        if "tie_word_embeddings" in kwargs:
            kwargs["weight_tying"] = kwargs.pop("tie_word_embeddings")
        super().__init__(**kwargs)
        vision: Any = vision_config or SIGLIP2_SO400M
        if isinstance(vision, dict):
            vision = SiglipVisionConfig(**vision)
        self.vision_config: Any = vision
        if kwargs.get("mm_hidden_size", vision.hidden_size) != vision.hidden_size:
            raise ValueError(
                f"LLaDA-V config: mm_hidden_size {kwargs['mm_hidden_size']} is not the tower's "
                f"width, {vision.hidden_size}; give the tower's sizes as vision_config."
            )
        self.mm_vision_tower = mm_vision_tower
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.image_token_id = image_token_id
        self.never_chosen_ids = tuple(never_chosen_ids)
        self.image_rules()  # refuses what it cannot read

    @property
    def image_parameters(self) -> int:
        """Numbers in the tower as far as it is used, the projector, and the newline."""
        tower, width = self.vision_config, self.d_model
        own, inner = tower.hidden_size, tower.intermediate_size
        patches = (tower.image_size // tower.patch_size) ** 2
        layer = 4 * (own + 1) * own + (2 * inner + 1) * own + inner + 4 * own
        embeddings = (3 * tower.patch_size**2 + 1 + patches) * own
        projector = (own + 1) * width + (width + 1) * width
        return (tower.num_hidden_layers - 1) * layer + embeddings + projector + width

    def image_rules(self) -> ImageRules:
        """How images are cut.

        Raises:
            ValueError: ``image_aspect_ratio`` or ``image_grid_pinpoints`` is none of LLaDA-V's.
        """
        tile = self.vision_config.image_size
        limit = re.fullmatch(r"anyres_max_([1-9]\d*)", str(self.image_aspect_ratio))
        if limit is None:
            raise ValueError(
                f"LLaDA-V config: image_aspect_ratio={self.image_aspect_ratio!r} is not supported, "
                "only anyres_max_N (LLaDA-V: anyres_max_4)."
            )
        return ImageRules(
            tile=tile,
            patches=tile // self.vision_config.patch_size,
            grids=_grids(self.image_grid_pinpoints, tile),
            max_tiles=int(limit[1]),
        )


def _grids(pinpoints: str | list[list[int]], tile: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of each grid in pixels.

    Args:
        pinpoints: a list of (width, height) in pixels, or the first and the last grid in tiles, as
            "(1x1),...,(6x6)".
    """
    if isinstance(pinpoints, str):
        ends = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", pinpoints)]
        if len(ends) < 2:
            raise ValueError(
                f"LLaDA-V config: image_grid_pinpoints={pinpoints!r} is no list of sizes and no "
                "range as (1x1),...,(6x6)."
            )
        (first_w, first_h), (last_w, last_h) = ends[0], ends[-1]
        tiles = product(range(first_w, last_w + 1), range(first_h, last_h + 1))
        return tuple((height * tile, width * tile) for width, height in tiles)
    if not pinpoints or any(not w or w % tile or not h or h % tile for w, h in pinpoints):
        raise ValueError(
            f"LLaDA-V config: image_grid_pinpoints={pinpoints!r}: every size must be a multiple "
            f"of the tower's image_size, {tile}."
        )
    return tuple((height, width) for width, height in pinpoints)
