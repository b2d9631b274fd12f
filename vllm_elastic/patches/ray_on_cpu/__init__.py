# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform, told how Ray counts its devices: patches/ray_on_cpu.

vLLM resolves its platform before general plugins run, so this is a platform plugin.
"""

from __future__ import annotations

import importlib.util

STOCK = "vllm.platforms.cpu.CpuPlatform"
OURS = "vllm_elastic.patches.ray_on_cpu.platform.RayCpuPlatform"


def cpu_platform_for_ray() -> str | None:
    """Entry point of ``vllm.platform_plugins``.

    Returns:
        the platform's class where vLLM would take its plain CPU platform and Ray is installed;
        None: leave the choice to vLLM.
    """
    if importlib.util.find_spec("ray") is None:
        return None
    from vllm.platforms import cpu_platform_plugin

    return OURS if cpu_platform_plugin() == STOCK else None
