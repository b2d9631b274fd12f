# SPDX-License-Identifier: Apache-2.0
"""Counts the bytes of the tensors that some code has alive at a time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that were made inside and are still alive; ``peak`` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage_of(leaf) for leaf in tree_leaves((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            key = _storage_of(leaf)
            if key is not None and key not in given and key not in self.sizes:
                self.sizes[key] = leaf.untyped_storage().nbytes()
                weakref.finalize(leaf.untyped_storage(), self.sizes.pop, key, None)
                self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def _storage_of(leaf: object) -> int | None:
    return leaf.untyped_storage()._cdata if isinstance(leaf, torch.Tensor) else None
