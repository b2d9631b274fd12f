# SPDX-License-Identifier: Apache-2.0
"""The fuzzer's pictures: some that can be read, some that cannot, and all in requests."""

from __future__ import annotations

import collections
import io
import json

import hypothesis
from PIL import Image

from tests.reliability.exchange import Ask
from tests.reliability.malformed_images import FILES, asks_with_images

DRAWS = hypothesis.settings(
    max_examples=200,
    phases=[hypothesis.Phase.generate],
    database=None,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)


def test_pictures_are_whole_broken_and_huge() -> None:
    found = collections.Counter[str]()

    @DRAWS
    @hypothesis.given(FILES)
    def draw(file: bytes) -> None:
        try:
            with Image.open(io.BytesIO(file)) as image:
                image.load()
            found["whole"] += 1
        except Image.DecompressionBombError:
            found["bomb"] += 1
        except Exception:
            found["broken"] += 1

    draw()
    assert min(found[kind] for kind in ("whole", "bomb", "broken")) > 0, found


def test_requests_have_pictures_and_text() -> None:
    kinds = collections.Counter[str]()

    @DRAWS
    @hypothesis.given(asks_with_images())
    def draw(ask: Ask) -> None:
        payload = json.loads(ask.payload() or b"")
        for part in payload["messages"][0]["content"]:
            kinds[part["type"]] += 1

    draw()
    assert {"image_url", "text", "image_embeds", "image_pil", "video_url"} <= kinds.keys()
    assert kinds["image_url"] > kinds["text"]
