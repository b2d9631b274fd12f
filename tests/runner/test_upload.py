# SPDX-License-Identifier: Apache-2.0
"""A pass's numbers in one buffer: what comes out is what was put in, and where it lies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vllm_elastic.runner import upload as module
from vllm_elastic.runner.download import Download
from vllm_elastic.runner.upload import Upload

CPU = torch.device("cpu")


def arrays(seed: int, largest: int) -> list[Any]:
    """Of every type and shape that a pass uploads."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(-9, 9, generator.integers(0, largest)).astype(dtype)
        for dtype in (np.int64, np.int32, np.bool_, np.float32, np.int32, np.int64)
    ] + [generator.integers(0, 9, (3, 5), dtype=np.int32), np.empty((0, 4), dtype=np.int64)]


@pytest.fixture(params=["shared", "copied"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a CPU host and device share the buffer; elsewhere it is copied."""
    if request.param == "shared":
        return lambda: Upload(CPU)

    def copied() -> Upload:
        monkeypatch.setattr(Upload, "_twin", lambda _, host: torch.zeros_like(host))
        return Upload(CPU)

    return copied


@pytest.mark.parametrize("largest", [50, 40_000], ids=["fits", "grows"])
def test_views_hold_what_was_put(make: Any, largest: int) -> None:
    """Arrays would overlap, be cut off, or be lost when the buffer grows."""
    upload = make()
    for seed in range(4):
        upload.start()
        wanted = arrays(seed, largest)
        views = [upload.put(array) for array in wanted]
        upload.send()
        for view, array in zip(views, wanted, strict=True):
            assert view.shape == array.shape
            assert torch.equal(view, torch.from_numpy(array))


def test_the_same_order_has_the_same_addresses(make: Any) -> None:
    """A captured graph would read another array's numbers."""
    upload = make()
    shapes = [np.zeros(7, dtype=np.int64), np.zeros((2, 3), dtype=np.int32)]
    addresses = []
    for _ in range(3):
        upload.start()
        addresses.append([upload.put(array).data_ptr() for array in shapes])
        upload.send()
    assert addresses[0] == addresses[1] == addresses[2]


def test_growing_ends(make: Any) -> None:
    """A buffer that was outgrown once would be outgrown at every pass, with a copy more."""
    upload = make()
    large = np.arange(module._FIRST_CAPACITY, dtype=np.int64)
    for _ in range(2):
        upload.start()
        view = upload.put(large)
        upload.send()
        assert torch.equal(view, torch.from_numpy(large))
    upload.start()
    upload.put(large)
    assert not upload._outgrown


def test_download_brings_each_value_its_own() -> None:
    """Results of one request would be handed to another."""
    download = Download()
    first = download.of(lambda a, b: (a, b), torch.tensor([1, 2]), None)
    second = download.of(list, torch.tensor([[0.5], [1.5]], dtype=torch.float64))
    download.run()
    ids, nothing = first.get()
    assert ids.tolist() == [1, 2] and nothing is None
    assert [row.tolist() for row in second.get()] == [[0.5], [1.5]]
