# SPDX-License-Identifier: Apache-2.0
"""The class that this package's entry point names; importing it imports vLLM's CPU platform."""

from __future__ import annotations

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    """A rank takes one of Ray's logical GPUs; nothing looks for a real one."""

    ray_device_key = "GPU"

    @classmethod
    def get_device_communicator_cls(cls) -> str:
        """Shared memory only where there is some: ranks may be on several machines."""
        return "vllm_elastic.patches.ray_on_cpu.communicator.NodeAwareCpuCommunicator"
