# SPDX-License-Identifier: Apache-2.0
"""vLLM's communicator of ranks on CPUs, told apart from machines: patches/ray_on_cpu."""

from __future__ import annotations

from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm.distributed.parallel_state import in_the_same_node_as


class NodeAwareCpuCommunicator(CpuCommunicator):
    """Shared memory among ranks that share memory, gloo among others."""

    def _all_group_ranks_share_shm_group_name(self) -> bool:
        # The stock test compares names made of the port of the group's store, which ranks on
        # several machines have in common. Both tests are collective: every rank makes both.
        same_name = super()._all_group_ranks_share_shm_group_name()
        same_memory = all(in_the_same_node_as(self.cpu_group))
        return bool(same_name and same_memory)
