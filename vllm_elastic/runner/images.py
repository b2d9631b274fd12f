# SPDX-License-Identifier: Apache-2.0
"""A fresh canvas's images: through the encoder, then into the stored inputs of layer 0.

From there a pass reads them like any stored hidden state, whenever one of their positions is a row
at layer 0: in the first pass, in a full one, as a tracked position or a probe. So the encoder runs
once a request, and the runner keeps no features beside the KV blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.output import NewRequestData

from vllm_elastic.runner.row_order import slots_of


def store_images(
    model: Any, request: NewRequestData, block_size: int, device: torch.device
) -> None:
    """Encode a request's images one by one, and store their rows in its KV blocks.

    Args:
        model: a ``DiffusionTransformer`` that takes images.
        block_size: positions a block of ``request.block_ids`` has.
    """
    (block_ids,) = request.block_ids
    blocks = np.asarray(block_ids, dtype=np.int64)
    for feature in request.mm_features:
        assert feature.data is not None
        start = feature.mm_position.offset
        positions = np.arange(start, start + feature.mm_position.length)
        slots = torch.from_numpy(slots_of(blocks, positions, block_size))
        rows = model.embed_multimodal(**feature.data.get_data())
        model.store_inputs(rows, slots.to(device))
