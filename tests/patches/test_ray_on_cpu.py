# SPDX-License-Identifier: Apache-2.0
"""Ray's logical devices for ranks on CPUs, and who shares memory: patches/ray_on_cpu."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import vllm.platforms

from vllm_elastic.patches import ray_on_cpu

SHOW_KEY = """
from vllm.platforms import current_platform as platform
print(platform.is_cpu(), repr(platform.ray_device_key))
"""

on_cpu = pytest.mark.skipif(
    vllm.platforms.cpu_platform_plugin() != ray_on_cpu.STOCK,
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
@pytest.mark.slow
def test_ranks_have_a_device_to_ask_for() -> None:
    assert platform_of("elastic") == "True 'GPU'"


@with_ray
@pytest.mark.parametrize("platform", [None, "vllm.platforms.zen_cpu.ZenCpuPlatform"])
def test_left_alone_where_it_is_not_the_plain_cpu_platform(
    monkeypatch: pytest.MonkeyPatch, platform: str | None
) -> None:
    """A CUDA build would be served on CPUs."""
    monkeypatch.setattr(vllm.platforms, "cpu_platform_plugin", lambda: platform)
    assert ray_on_cpu.cpu_platform_for_ray() is None


def test_left_alone_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert ray_on_cpu.cpu_platform_for_ray() is None


def test_patch_is_still_needed() -> None:
    from vllm.platforms.cpu import CpuPlatform

    assert not CpuPlatform.ray_device_key, (
        "patch ray_on_cpu, part devices, can go: vLLM's CPU platform has a device for Ray. Remove "
        "ray_device_key from vllm_elastic/patches/ray_on_cpu/platform.py, its part of the patch's "
        "README and this test; and the whole platform if its communicator is needed no more."
    )


@pytest.mark.parametrize("same_name", [True, False])
@pytest.mark.parametrize("same_memory", [[True, True], [True, False]])
def test_shared_memory_needs_both(
    monkeypatch: pytest.MonkeyPatch, same_name: bool, same_memory: list[bool]
) -> None:
    """The same name for it, as in stock vLLM, and memory that is really shared."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    from vllm_elastic.patches.ray_on_cpu import communicator as cpu_communicator

    asked = "_all_group_ranks_share_shm_group_name"
    assert asked in vars(CpuCommunicator), "renamed: the override would do nothing"
    monkeypatch.setattr(CpuCommunicator, asked, lambda self: same_name)
    monkeypatch.setattr(cpu_communicator, "in_the_same_node_as", lambda group: same_memory)
    communicator = object.__new__(cpu_communicator.NodeAwareCpuCommunicator)
    communicator.cpu_group = None
    assert getattr(communicator, asked)() is (same_name and all(same_memory))


@on_cpu
@with_ray
def test_platform_names_a_communicator_that_exists() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from vllm_elastic.patches.ray_on_cpu.communicator import NodeAwareCpuCommunicator
    from vllm_elastic.patches.ray_on_cpu.platform import RayCpuPlatform

    name = RayCpuPlatform.get_device_communicator_cls()
    assert resolve_obj_by_qualname(name) is NodeAwareCpuCommunicator
