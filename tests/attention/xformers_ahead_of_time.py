# SPDX-License-Identifier: Apache-2.0
"""Compiles xformers' kernel as the backend calls it, for a GPU that need not be there.

Prints a line of JSON for each compilation, as ``ahead_of_time`` does.

Arguments: compute capability; heads, KV heads, head size, block size and type as JSON.
"""

from __future__ import annotations

import json
import sys

from tests.attention.ahead_of_time import NoDevice, compile_only  # before Triton: no interpreter

import torch  # isort: skip
from triton.runtime import driver  # isort: skip

from vllm_elastic.attention import paged_xformers  # isort: skip

if __name__ == "__main__":
    driver.set_active(NoDevice(int(sys.argv[1])))
    sizes = json.loads(sys.argv[2])
    heads, kv_heads, dim, page_size = (
        sizes[name] for name in ("heads", "kv_heads", "dim", "block_size")
    )
    dtype, group = getattr(torch, sizes["dtype"]), heads // kv_heads
    compile_only(["pass"])
    for rows, blocks in (([1], 1), ([7, 2], 3)):
        slots = torch.zeros(blocks * page_size, kv_heads, 2 * dim, dtype=dtype)
        keys, values = slots.split(dim, dim=-1)
        tables = torch.zeros(len(rows), 16, dtype=torch.int32)
        mask = paged_xformers.make_mask(rows, [blocks] * len(rows), tables, page_size, group)
        queries = torch.zeros(sum(rows), heads, dim, dtype=dtype)
        paged_xformers.attend(queries, keys, values, mask, 1.0)
