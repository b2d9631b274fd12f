# SPDX-License-Identifier: Apache-2.0
"""``--async-scheduling`` on a CPU, where vLLM takes it back, and for models of few rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_elastic.decoding import overlap


@contextlib.contextmanager
def on_cpus() -> Iterator[None]:
    """Engines that are made while it is open, and ask for it, overlap."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    check = platform.check_and_update_config

    def keep(vllm_config: Any) -> None:
        scheduler = vllm_config.scheduler_config
        asked = scheduler.async_scheduling
        check(vllm_config)
        scheduler.async_scheduling = asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", staticmethod(keep))
        patch.setattr(overlap, "GROUP_ROWS", 1)
        yield
