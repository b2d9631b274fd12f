# SPDX-License-Identifier: Apache-2.0
"""Where a chat's images come from: vLLM's connector, whose every refusal is the client's to mend.

vLLM answers some bad images with a 500. A server out of reach stays one: it may be back.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaIO

NAME = "llada_v"

MAX_PIXELS = 1 << 26
"""The most that an image has, 200 MB once it is decoded; LLaDA-V looks at 5 million. vLLM's own
limit, 179 million, is one at which a file of a few kilobytes fills half a gigabyte."""


def choose_connector() -> None:
    """Take this connector, and a limit of pixels, where the operator has not set others."""
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", NAME)
    os.environ.setdefault("VLLM_MAX_IMAGE_PIXELS", str(MAX_PIXELS))


@MEDIA_CONNECTOR_REGISTRY.register(NAME)
class ImageConnector(MediaConnector):
    """vLLM's connector, with a 400 for what is no image that can be had."""

    def load_from_url(self, url: str, media_io: MediaIO, **options: Any) -> Any:
        with _refusals(url):
            return super().load_from_url(url, media_io, **options)

    async def load_from_url_async(self, url: str, media_io: MediaIO, **options: Any) -> Any:
        with _refusals(url):
            return await super().load_from_url_async(url, media_io, **options)


@contextmanager
def _refusals(url: str) -> Iterator[None]:
    """What an image is refused with becomes a 400.

    Raises:
        VLLMValidationError: says what is wrong with the image, and what to send.
    """
    try:
        yield
    except VLLMClientError:
        raise
    except (ValueError, NotImplementedError, Image.DecompressionBombError) as error:
        raise _refused(error) from None
    except (RuntimeError, OSError) as error:
        if url[:5].lower() == "file:":
            raise _refused(error) from None
        raise


def _refused(error: Exception) -> VLLMValidationError:
    reason = str(error).rstrip(".")
    return VLLMValidationError(
        f"image_url: {reason}. Send a whole PNG, JPEG or WebP file, as a data URL "
        "(data:image/png;base64,...) or by its http address.",
        parameter="image_url",
    )
