# SPDX-License-Identifier: Apache-2.0
"""Engines of the benchmark commands stay to the end of the session: small caches for them."""

from __future__ import annotations

import pytest

from vllm_elastic.bench import engine


@pytest.fixture(autouse=True)
def _small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "DEFAULT_KV_CACHE_BYTES", 64 << 20)
    # A card's caches would be a share of it each.
    monkeypatch.setattr(engine, "on_gpu", lambda: False)
