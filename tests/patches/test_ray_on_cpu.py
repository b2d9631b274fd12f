# SPDX-License-Identifier: Apache-2.0
"""Ray's logical devices for ranks on CPUs: patches/ray-on-cpu."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import vllm.platforms

from vllm_elastic import ray_platform

SHOW_KEY = """
from vllm.platforms import current_platform as platform
print(platform.is_cpu(), repr(platform.ray_device_key))
"""

on_cpu = pytest.mark.skipif(
    vllm.platforms.cpu_platform_plugin() != ray_platform.STOCK,
    reason="the patch is for vLLM's plain CPU platform",
)
with_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the patch is for Ray, which is not installed"
)


def platform_of(plugins: str) -> str:
    """What a fresh process says of its platform, with these plugins."""
    env = os.environ | {"VLLM_PLUGINS": plugins}
    done = subprocess.run(
        [sys.executable, "-c", SHOW_KEY], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


@on_cpu
@with_ray
def test_ranks_have_a_device_to_ask_for() -> None:
    assert platform_of("elastic") == "True 'GPU'"


@with_ray
@pytest.mark.parametrize("platform", [None, "vllm.platforms.zen_cpu.ZenCpuPlatform"])
def test_left_alone_where_it_is_not_the_plain_cpu_platform(
    monkeypatch: pytest.MonkeyPatch, platform: str | None
) -> None:
    """A CUDA build would be served on CPUs."""
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: platform)
    assert ray_platform.cpu_platform_for_ray() is None


def test_left_alone_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ray_platform.cpu_platform_for_ray() is None


def test_patch_is_still_needed() -> None:
    from vllm.platforms.cpu import CpuPlatform

    assert not CpuPlatform.ray_device_key, (
        "patch ray-on-cpu can go: vLLM's CPU platform has a device for Ray. Remove "
        "patches/ray-on-cpu, its row in patches/README.md, vllm_elastic/ray_platform.py, "
        "vllm_elastic/cpu_platform.py, their entry point in pyproject.toml and this test."
    )
