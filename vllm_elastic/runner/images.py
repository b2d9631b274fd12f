# SPDX-License-Identifier: Apache-2.0
"""A fresh canvas's images: through the encoder, then into the stored inputs of layer 0.

From there a pass reads them like any stored hidden state, whenever one of their positions is a row
at layer 0: in the first pass, in a full one, as a tracked position or a probe. So the encoder runs
once a request, and the runner keeps no features beside the KV blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from vllm.multimodal.inputs import MultiModalFeatureSpec

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.runner.upload import Upload


class Images:
    """Of one pass.

    Args:
        features: by request id, what vLLM sent of each image of a request.
        block_size: positions a block of ``plan.block_ids`` has.
    """

    def __init__(
        self,
        plans: Sequence[PassPlan],
        features: Mapping[str, Sequence[MultiModalFeatureSpec]],
        block_size: int,
        upload: Upload,
    ) -> None:
        self._images: list[tuple[MultiModalFeatureSpec, torch.Tensor]] = []
        for plan in plans:
            blocks = np.asarray(plan.block_ids, dtype=np.int64)
            for feature in features.get(plan.request_id, ()):
                at = feature.mm_position
                own = np.arange(at.offset, at.offset + at.length)
                slots = blocks[own // block_size] * block_size + own % block_size
                self._images.append((feature, upload.put(slots)))

    def store(self, model: Any) -> None:
        """Once the upload was sent: encode each image and store its rows.

        Args:
            model: a ``DiffusionTransformer`` that takes images.
        """
        for feature, slots in self._images:
            assert feature.data is not None
            model.store_inputs(model.embed_multimodal(**feature.data.get_data()), slots)
