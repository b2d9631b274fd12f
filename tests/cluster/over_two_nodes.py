# SPDX-License-Identifier: Apache-2.0
"""The driver of two ranks on the nodes of the Ray that the environment names.

A process of its own, since Ray connects a process to one cluster, once.

python -m tests.cluster.over_two_nodes MODEL FOUND.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from tests.engine import test_tensor_parallel
from tests.engine.agreement import agrees
from tests.engine.test_oracle import CONFIGS
from tests.engine.test_tensor_parallel import assert_equals_oracle, requests_of, start
from tests.engines_kept import end_ranks
from vllm_elastic.reference import LLaDA


def main() -> None:
    """Serve, compare with the oracle, and write what was found."""
    directory, result = map(Path, sys.argv[1:])
    oracle = LLaDA.from_pretrained(directory)
    served = start(oracle, directory, "gqa-tied", "ray")
    compared: list[bool] = []

    def counted(*case: Any) -> bool:
        compared.append(agrees(*case))
        return compared[-1]

    try:
        with mock.patch.object(test_tensor_parallel, "agrees", counted):
            assert_equals_oracle(served, CONFIGS)
        found = {
            "ranks": served.engine.llm.collective_rpc(whereabouts),  # type: ignore[attr-defined]
            "requests": len(requests_of(CONFIGS)),
            "compared": len(compared),
            "equal": compared.count(True),
        }
    finally:
        end_ranks(served.engine)
    result.write_text(json.dumps(found))


def whereabouts(worker: Any) -> dict[str, Any]:
    """Runs in a worker: on which node and network it is, and what it sends sums with."""
    import ray
    from vllm.distributed.parallel_state import get_tp_group

    communicator = get_tp_group().device_communicator
    return {
        "rank": worker.rank,
        "node": ray.get_runtime_context().get_node_id(),
        "ip": ray.util.get_node_ip_address(),
        "network": os.readlink("/proc/self/ns/net"),
        "shared memory": os.stat("/dev/shm").st_dev,
        "communicator": type(communicator).__name__,
        "collectives": getattr(communicator.dist_module, "__name__", "shared memory"),
    }


if __name__ == "__main__":
    main()
