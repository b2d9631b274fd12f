# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies for chats with pictures that are broken, odd, too large or not there."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image

from tests.reliability.exchange import Ask
from tests.reliability.json_values import ANYTHING, TEXTS

CANVAS = 6
SIDES = st.sampled_from([1, 2, 3, 15, 16, 17, 96, 97, 200, 1500])
MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK", "I;16", "F")
KINDS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "ICO")


def _file(mode: str, width: int, height: int, kind: str) -> bytes:
    """An image file; a PNG of RGB where the format cannot hold such an image."""
    image = Image.new(mode, (width, height), 1)
    file = io.BytesIO()
    try:
        image.save(file, kind)
    except (OSError, ValueError, KeyError):
        file = io.BytesIO()
        image.convert("RGB").save(file, "PNG")
    return file.getvalue()


def _claiming(width: int, height: int, bits: int, color: int) -> bytes:
    """A PNG of a few bytes whose header says this."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(999))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _spoilt(file: bytes, cuts: list[tuple[float, bytes]], end: float) -> bytes:
    """A file with bytes put over others at shares of its length, and cut off at a share."""
    spoilt = bytearray(file)
    for share, data in cuts:
        at = int(share * len(spoilt))
        spoilt[at : at + len(data)] = data
    return bytes(spoilt[: int(end * len(spoilt))])


WHOLE = st.builds(_file, st.sampled_from(MODES), SIDES, SIDES, st.sampled_from(KINDS))
SHARES = st.floats(0, 1)
SPOILT = st.builds(
    _spoilt,
    WHOLE,
    st.lists(st.tuples(SHARES, st.binary(min_size=1, max_size=8)), max_size=4),
    SHARES | st.just(1.0),
)
CLAIMING = st.builds(
    _claiming,
    st.sampled_from([0, 1, 9_000, 60_000, 2**31 - 1, 2**32 - 1]),
    st.sampled_from([0, 1, 9_000, 60_000, 2**31 - 1, 2**32 - 1]),
    st.sampled_from([0, 1, 8, 16, 255]),
    st.sampled_from([0, 2, 3, 6, 7]),
)
FILES = WHOLE | SPOILT | CLAIMING | st.binary(max_size=60)


def _url(file: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


URLS = st.builds(
    _url, FILES, st.sampled_from(["image/png", "image/jpeg", "image/", "text/plain", "a", ""])
) | st.sampled_from(
    [
        *("", "data:", "data:image/png", "data:image/png;base64", "data:image/png;base64,@"),
        *("data:image/png;base64,AAA", "data:image/png,raw", "data:;base64,", "ftp://a/b.png"),
        *("file:///etc/passwd", "file://", "gopher://x", "javascript:1", "//a/b", "http://"),
        "data:image/png;base64," + "A" * 300_000,
    ]
)
"""No address of another machine: what cannot be reached is a 500 of stock vLLM's."""


def _named(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


IMAGES = st.builds(_named, URLS)
PARTS = (
    IMAGES
    | st.builds(lambda url: {"type": "image_url", "image_url": url}, URLS | ANYTHING)
    | st.builds(lambda value: {"type": "image_url", "image_url": {"url": value}}, ANYTHING)
    | st.builds(lambda value: {"type": "image_embeds", "image_embeds": value}, TEXTS | ANYTHING)
    | st.builds(
        lambda kind, url: {"type": kind, kind: {"url": url}},
        st.sampled_from(["video_url", "audio_url", "input_audio", "image", "image_pil"]),
        URLS,
    )
)
WORDS = st.sampled_from(["What is at a1 ?", "<image>", "<image> <image>", "", "<|mdm_mask|>"])
TEXT = st.builds(lambda words: {"type": "text", "text": words}, WORDS | TEXTS)


def _chat(parts: list[Any], more: dict[str, Any]) -> Ask:
    message = {"role": "user", "content": parts}
    return Ask("/v1/chat/completions", {"messages": [message], "max_tokens": CANVAS, **more})


def asks_with_images() -> SearchStrategy[Ask]:
    """Chats with up to four parts, most of them pictures, and options that pictures have."""
    options: SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
        {},
        optional={
            "mm_processor_kwargs": ANYTHING,
            "media_io_kwargs": ANYTHING,
            "max_tokens": st.sampled_from([1, 6, 2000, 10**6]),
            "stream": st.booleans(),
        },
    )
    parts = st.lists(IMAGES | IMAGES | PARTS | TEXT, min_size=1, max_size=4)
    alone = st.builds(lambda image: [image, {"type": "text", "text": "Read row 1 ."}], IMAGES)
    return st.builds(_chat, alone, st.just({})) | st.builds(_chat, parts, options)
