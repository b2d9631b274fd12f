# SPDX-License-Identifier: Apache-2.0
"""A pass's numbers in one buffer: what comes out is what was put in, and where it lies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.device import DEVICE, ON_SECOND
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


PLACES = ["shared", "copied"] + ["there"] * (DEVICE != CPU)


@pytest.fixture(params=PLACES)
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """On a CPU host and device share the buffer; elsewhere it is copied."""
    if request.param == "there":
        return lambda: Upload(DEVICE)
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
            assert torch.equal(view.cpu(), torch.from_numpy(array))


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
        assert torch.equal(view.cpu(), torch.from_numpy(large))
    upload.start()
    upload.put(large)
    assert not upload._outgrown


class Late:
    """A device that is always behind: what is queued is done when the host waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._queue: list[Callable[[], Any]] = []
        self._done = 0
        device, copy = self, torch.Tensor.copy_

        class Event:
            def record(self) -> None:
                self._at = device.queued

            def synchronize(self) -> None:
                device.run(self._at)

        def queued(to: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
            assert non_blocking
            device.do(lambda: copy(to, source))
            return to

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.Tensor, "copy_", queued)
        monkeypatch.setattr(Upload, "_twin", lambda _, host: torch.zeros_like(host))
        self.upload = Upload(CPU)
        self.upload.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]

    @property
    def queued(self) -> int:
        return len(self._queue)

    def do(self, work: Callable[[], Any]) -> None:
        self._queue.append(work)

    def run(self, stop: int) -> None:
        while self._done < stop:
            self._queue[self._done]()
            self._done += 1


@pytest.mark.skipif(ON_SECOND, reason="torch looks up the method that is replaced here")
def test_a_pass_in_flight_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is laid out while another one runs would put its numbers in that one's place, on
    the host before they are copied, or on the device before they are read."""
    device = Late(monkeypatch)
    upload = device.upload
    read: list[list[int]] = []
    for number in range(4):
        upload.start()
        view = upload.put(np.full(3, number))
        upload.send()
        device.do(lambda view=view: read.append(view.tolist()))  # the pass
        assert len(read) <= number, "the host waited for this pass"
    device.run(device.queued)
    assert read == [[n, n, n] for n in range(4)]


@pytest.fixture(params=["here", "elsewhere"])
def _away(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "elsewhere":
        monkeypatch.setattr(Download, "_is_here", lambda *_: False)


@pytest.mark.usefixtures("_away")
def test_download_brings_each_value_its_own() -> None:
    """Results of one request would be handed to another."""
    there = partial(torch.tensor, device=DEVICE)
    download = Download()
    first = download.of(lambda a, b: (a, b), there([1, 2]), None)
    flag = download.of(lambda a: a, there([True]))  # no number after it is aligned
    # A piece of one number, whose strides are those of what it was cut from.
    alone = download.of(lambda a: a, there([[2.0, 3.0, 4.0]]).T.contiguous()[1:2])
    second = download.of(list, there([[0.5], [1.5]], dtype=torch.float64))
    download.send()
    later = Download()
    third = later.of(list, there([7, 8]))
    later.send()
    assert [int(each) for each in third.get()] == [7, 8]
    ids, nothing = first.get()
    assert ids.tolist() == [1, 2] and nothing is None
    assert flag.get().tolist() == [True]
    assert alone.get().tolist() == [[3.0]]
    assert [row.tolist() for row in second.get()] == [[0.5], [1.5]]
