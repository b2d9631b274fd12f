# SPDX-License-Identifier: Apache-2.0
"""LLaDA-V: LLaDA with images in its prompt.

The language model is LLaDA's under Llama's weight names. An image becomes rows that enter at layer
0 in place of embeddings; from there on its positions are positions like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from vllm_elastic.models.image_encoder import ImageEncoder
from vllm_elastic.models.image_processor import DummyImages, ImageInfo, ImageProcessor
from vllm_elastic.models.llada_v_config import PLACEHOLDER, LLaDAVConfig
from vllm_elastic.models.llama_like import LlamaLike


@MULTIMODAL_REGISTRY.register_processor(ImageProcessor, info=ImageInfo, dummy_inputs=DummyImages)
class LlavaLLaDAModelLM(LlamaLike, SupportsMultiModal):
    """Weight names are those of the released checkpoint (``model.layers.*``)."""

    hf_to_vllm_mapper = LlamaLike.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "vision_tower.vision_tower": "images.vision_tower",
            "mm_projector.0": "images.projector_in",
            "mm_projector.2": "images.projector_out",
            "image_newline": "images.newline",
        }
    )
    supports_encoder_tp_data = True
    loaded_apart = ("images.",)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config: LLaDAVConfig = vllm_config.model_config.hf_config
        self.images = ImageEncoder(vllm_config, config, maybe_prefix(prefix, "images"))

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """What vLLM's chat puts where the ``i``-th image goes."""
        if modality == "image":
            return PLACEHOLDER
        raise ValueError(f"LLaDA-V takes images, no {modality}")

    def embed_multimodal(
        self,
        pixel_values: torch.Tensor | None = None,
        image_size: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows [positions, d] of one image, on every rank.

        Args:
            pixel_values: its tiles [tiles, 3, side, side]; image_size: (height, width) in pixels.
            image_embeds: in place of both, the rows themselves (``--enable-mm-embeds``).
        """
        if image_embeds is not None:
            return image_embeds.to(self.images.newline)
        assert pixel_values is not None and image_size is not None
        return self.images(pixel_values, *image_size.tolist())

    def largest_image(self) -> dict[str, torch.Tensor]:
        """Arguments of ``embed_multimodal`` that take the most memory."""
        rules = self.images.rules
        tiles = torch.zeros(rules.most_tiles, 3, rules.tile, rules.tile, device="cpu")
        size = torch.tensor(max(rules.grids, key=math.prod), device="cpu")
        return {"pixel_values": tiles, "image_size": size}

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load LLaDA-V's tensor names; returns the parameters that were filled.

        Raises:
            ValueError: a tensor that LLaDA-V does not have, or one that the checkpoint does not.
        """
        first_load = self._to_be_filled and not self._quantised
        of_images: list[tuple[str, torch.Tensor]] = []

        def of_text() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                ours = self._names.map_name(name) or ""
                if ours.startswith("images."):
                    of_images.append((ours.removeprefix("images."), weight))
                else:
                    yield name, weight

        loaded = super().load_weights(of_text())
        filled = self.images.load_weights(of_images)
        if lacking := first_load and sorted(dict(self.images.named_parameters()).keys() - filled):
            raise ValueError(
                f"the checkpoint has nothing for {len(lacking)} weights of LLaDA-V's images, "
                f"{lacking[0]} among them. Were files left out?"
            )
        return loaded | {f"images.{name}" for name in filled}
