# SPDX-License-Identifier: Apache-2.0
"""A server of a LLaDA-V of random weights: images in chats, and bad ones that cost nobody else."""

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from tests.tiny_llada_v import IMAGE, NEVER, TURN, TinyLLaDAV, picture
from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.config import ElasticConfig
from vllm_elastic.reference import DecodingOptions, decode

from .conftest import Client
from .test_refusals import refusal

pytestmark = pytest.mark.slow  # a server of its own

MAX_MODEL_LEN = 256


def data_url(image: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return as_url(file.getvalue(), kind)


def as_url(file: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file).decode()}"


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def png_that_claims(width: int, height: int) -> bytes:
    """A file of a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(999))), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class ImageClient(Client):
    def ask(self, *parts: dict[str, Any], **options: Any) -> tuple[int, dict[str, Any]]:
        messages = [{"role": "user", "content": list(parts)}]
        return self.post("chat/completions", messages=messages, **{"max_tokens": 8, **options})


@pytest.fixture(scope="module")
def model() -> TinyLLaDAV:
    return TinyLLaDAV()


@pytest.fixture(scope="module")
def seeing(model: TinyLLaDAV, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ImageClient]:
    folder = tmp_path_factory.mktemp("llada_v")
    model.save(folder)
    options = ["--dtype", "float32", "--kv-cache-memory-bytes", str(64 << 20)]
    options += ["--served-model-name", "tiny", "--limit-mm-per-prompt", json.dumps({"image": 2})]
    options += ["--elastic-config", json.dumps({"preset": "exact"})]
    with ServerProcess(folder, options, log=folder / "server.log") as server:
        yield ImageClient(server)


PICTURE = data_url(picture(100, 60))


def test_chat_equals_oracle(seeing: ImageClient, model: TinyLLaDAV) -> None:
    """One image, two, and none; the prompt's tokens are those that the server says it has."""
    cases: list[list[Any]] = [
        [picture(100, 60), "w1 w2"],
        ["w7", picture(31, 80), picture(50, 50, 1), "w9"],
        ["w3 w4 w5"],
    ]
    for parts in cases:
        images = [part for part in parts if isinstance(part, Image.Image)]
        sent = [text(part) if isinstance(part, str) else image(data_url(part)) for part in parts]
        status, answer = seeing.ask(*sent, max_tokens=12, return_token_ids=True)
        assert status == 200, answer
        features = [model.features(each, len(images)) for each in images]
        prompt = once(answer["prompt_token_ids"], [len(rows) for rows in features])
        oracle = model.oracle
        if features:
            oracle, prompt = model.seeing(prompt, features)
        window = ElasticConfig.from_dict({"preset": "exact"}).window
        options = DecodingOptions(never=NEVER, window=window)
        expected = decode(oracle, prompt, 12, options)
        said = [t for t in answer["choices"][0]["token_ids"] if t != TURN]
        assert said == expected.token_ids


def once(prompt: list[int], counts: list[int]) -> list[int]:
    """A prompt with one placeholder in place of each image's run of them."""
    short: list[int] = []
    remaining = list(counts)
    at = 0
    while at < len(prompt):
        short.append(prompt[at])
        at += remaining.pop(0) if prompt[at] == IMAGE else 1
    assert not remaining
    return short


TOO_MUCH = {"max_tokens": 250}
BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "no image": ([text("w1 <image> w2")], {}, ["1 <image>", "send an image for each"]),
    "an image too few": ([text("<image>"), image(PICTURE)], {}, ["2 <image> and 1 images"]),
    "too many": ([image(PICTURE)] * 3, {}, ["At most 2 image(s)"]),
    "no base64": ([image("data:image/png;base64,@@@@")], {}, ["base64", "Send a whole PNG"]),
    "raw data": ([image("data:image/png,raw")], {}, ["base64", "Send a whole PNG"]),
    "an object for Python": (
        [{"type": "image_pil", "image_pil": {"url": "a"}}, image(PICTURE)],
        {},
        ["a dict is no image", "image_url"],
    ),
    "no image file": ([image(as_url(b"hello"))], {}, ["cannot identify", "Send a whole PNG"]),
    "half a file": (
        [image(as_url(base64.b64decode(PICTURE.partition(",")[2])[:9000]))],
        {},
        ["truncated", "Send a whole PNG"],
    ),
    "bomb": ([image(as_url(png_that_claims(60000, 60000)))], {}, ["3600000000", "Send"]),
    "small bomb": ([image(as_url(png_that_claims(9000, 9000)))], {}, ["81000000", "67108864"]),
    "scheme": ([image("ftp://example.org/a.png")], {}, ["HTTP, data or file", "data URL"]),
    "local file": ([image("file:///etc/passwd")], {}, ["--allowed-local-media-path"]),
    "a line": ([image(data_url(picture(4000, 3)))], {}, ["4000 x 3", "crop or pad"]),
    "canvas": ([image(PICTURE)], TOO_MUCH, ["346 positions", "256", "Lower it to 160"]),
    "video": (
        [{"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}],
        {},
        ["At most 0 video(s)"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_a_400(seeing: ImageClient, name: str) -> None:
    parts, options, words = BAD[name]
    message = refusal(seeing.ask(*parts, **options))
    assert [word for word in words if word not in message] == [], message
    assert len(message) < 400, "an object was dumped into the message"
    good = seeing.ask(image(PICTURE), text("w1"))
    assert good[0] == 200, good
