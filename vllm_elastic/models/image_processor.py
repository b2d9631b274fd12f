# SPDX-License-Identifier: Apache-2.0
"""LLaDA-V's images in vLLM's multimodal pipeline: pixels to tiles, placeholders to positions.

An image by itself is cut into tiles. Of several in one prompt each is one tile, padded to a square:
so LLaDA-V was trained and is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict, MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from vllm_elastic.models.image_layout import ImageRules
from vllm_elastic.models.llada_v_config import LLaDAVConfig

_AMONG_SEVERAL = "among_several"
"""Our only processor option: set for the images of a prompt that has more than one. It is part of
the key under which vLLM's processor cache keeps an image."""


class ImageInfo(BaseProcessingInfo):
    """What vLLM asks of a model before it has seen an image."""

    def get_hf_config(self) -> LLaDAVConfig:
        return self.ctx.get_hf_config(LLaDAVConfig)

    @cached_property
    def rules(self) -> ImageRules:
        return self.get_hf_config().image_rules()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.rules.most_positions}

    def num_positions(self, height: int, width: int, among_several: bool) -> int:
        """Canvas positions of an image of so many pixels.

        Raises:
            VLLMValidationError: an image that the model cannot take.
        """
        if among_several:
            return self.rules.padded_positions
        try:
            return self.rules.layout(height, width).num_positions
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="image") from None


class DummyImages(BaseDummyInputsBuilder[ImageInfo]):
    """Images for vLLM's warm-up."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        token_id = self.info.get_hf_config().image_token_id
        token: str = self.info.get_tokenizer().convert_ids_to_tokens(token_id)
        return token * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> MultiModalDataDict:
        side = 2 * self.info.rules.tile
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=side, height=side, num_images=count)}


class ImageProcessor(BaseMultiModalProcessor[ImageInfo]):
    """Makes tiles of a prompt's images, and room for them in the prompt."""

    requires_tokenizer = False

    @cached_property
    def _tiles(self) -> LlavaOnevisionImageProcessorPil:
        rules = self.info.rules
        return LlavaOnevisionImageProcessorPil(
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"height": rules.tile, "width": rules.tile},
            image_grid_pinpoints=[list(grid) for grid in rules.grids],
        )

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Raises:
        VLLMValidationError: not as many images as placeholders, or options that no image has.
        """
        if inputs.hf_processor_mm_kwargs:
            raise VLLMValidationError(
                "mm_processor_kwargs: an image is cut as config.json says, there is nothing to "
                f"set; leave out {', '.join(inputs.hf_processor_mm_kwargs)}.",
                parameter="mm_processor_kwargs",
            )
        count = inputs.mm_data_items.get_all_counts().get("image", 0)
        marked = inputs.prompt.count(self.info.get_hf_config().image_token_id)
        if marked != count:
            raise VLLMValidationError(
                f"image: the prompt has {marked} <image> and {count} images; write <image> once "
                "where each image goes (chat messages do it by themselves).",
                parameter="image",
            )
        if count > 1:
            inputs.hf_processor_mm_kwargs = {_AMONG_SEVERAL: True}
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        images: list[Any] = list(hf_data["images"])  # type: ignore[call-overload]
        among_several = bool(hf_kwargs.get(_AMONG_SEVERAL))
        tiles, sizes = [], []
        for image, size in zip(images, _sizes(images), strict=True):
            self.info.num_positions(*size, among_several)  # refuses before it works
            # Transformers pads to a square what has company.
            asked = [[image, image]] if among_several else image
            made = self._tiles(images=asked, return_tensors="pt")["pixel_values"][0]
            tiles.append(made.to(self.info.ctx.model_config.dtype))
            sizes.append(size)
        image_size = torch.tensor(sizes, device="cpu")
        return BatchFeature({"pixel_values": tiles, "image_size": image_size})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        of_each = MultiModalFieldConfig.batched("image")
        return dict.fromkeys(("pixel_values", "image_size", "image_embeds"), of_each)

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token_id = self.info.get_hf_config().image_token_id
        among_several = bool(hf_processor_mm_kwargs.get(_AMONG_SEVERAL))

        def positions(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageProcessorItems, ImageEmbeddingItems))
            if isinstance(images, ImageEmbeddingItems):
                return [token_id] * images.get_feature_size(index)
            size = images.get_image_size(index)
            return [token_id] * self.info.num_positions(size.height, size.width, among_several)

        return [PromptReplacement(modality="image", target=[token_id], replacement=positions)]


def _sizes(images: Sequence[Any]) -> list[tuple[int, int]]:
    """(height, width) of images of any kind that vLLM takes.

    Raises:
        VLLMValidationError: something that is none: HTTP has no objects for an ``image_pil``.
    """
    for image in images:
        if not isinstance(image, Image.Image | np.ndarray | torch.Tensor):
            raise VLLMValidationError(
                f"image: a {type(image).__name__} is no image; send it as image_url (image_pil is "
                "for Python, and takes a PIL image).",
                parameter="image",
            )
    found = ImageProcessorItems(images)
    sizes = [found.get_image_size(index) for index in range(len(images))]
    return [(size.height, size.width) for size in sizes]
