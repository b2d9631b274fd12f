# SPDX-License-Identifier: Apache-2.0
"""Who works out attention, by the device of the keys."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_elastic.runner.statistics import attention_sums


@pytest.mark.parametrize("is_cuda", [True, False])
def test_kernels_on_cuda_alone(is_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU would ask for Triton, or a GPU copy whole canvases of keys to float32."""
    pytest.importorskip("triton")
    from vllm_elastic.attention import paged_statistics
    from vllm_elastic.runner.statistics import kernel_sums

    warmed: list[Any] = []
    monkeypatch.setattr(kernel_sums, "KernelSums", lambda *_: "kernels")
    monkeypatch.setattr(attention_sums, "TorchSums", lambda *_: "torch")
    monkeypatch.setattr(attention_sums.ranks, "count", lambda: 2)
    monkeypatch.setattr(paged_statistics, "warm_up", lambda *sizes: warmed.append(sizes[1:]))
    keys = SimpleNamespace(is_cuda=is_cuda)
    cache: Any = SimpleNamespace(keys=keys, key_layout=None, num_heads=3, hidden_stride=4)
    nothing: Any = None
    chosen: Any = attention_sums.attention_sums(nothing, cache, nothing, nothing, nothing)
    attention_sums.warm_up(cache)
    assert chosen == ("kernels" if is_cuda else "torch")
    assert warmed == ([(3, 6, 4)] if is_cuda else [])
