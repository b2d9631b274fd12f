# SPDX-License-Identifier: Apache-2.0
"""One of two ranks that add a number with a communicator of vLLM's; prints sum and way.

python -m tests.cluster.sum_of_ranks RANK IP PORT MODULE.CLASS
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname


def main() -> None:
    """Both ranks end in an error where they share no memory and the communicator thinks so."""
    rank, ip, port, name = sys.argv[1:]
    current_platform.import_kernels()
    assert hasattr(torch.ops._C, "init_shm_manager"), "without it no communicator shares memory"
    os.environ["VLLM_DIST_IDENT"] = port  # as vLLM's worker does for a group's store
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://{ip}:{port}",
        rank=int(rank),
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    group = torch.distributed.group.WORLD
    communicator = resolve_obj_by_qualname(name)(
        cpu_group=group, device=torch.device("cpu"), device_group=group, unique_name="tp:0"
    )
    total = communicator.all_reduce(torch.tensor([1.0 + int(rank)]))
    gathered = communicator.all_gather(torch.tensor([1.0 + int(rank)]))
    way = "gloo" if communicator.dist_module is torch.distributed else "shared memory"
    print(total.tolist(), gathered.tolist(), way)


if __name__ == "__main__":
    main()
