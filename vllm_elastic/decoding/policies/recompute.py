# SPDX-License-Identifier: Apache-2.0
"""No cache: everything is recomputed at every step. The baseline of all comparisons."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_elastic.decoding.policies.base import RefreshPolicy

if TYPE_CHECKING:
    from vllm_elastic.decoding.request import DenoisingRequest


class Recompute(RefreshPolicy):
    """All T rows at layer 0 in each step; the same window and commit rule as any policy."""

    name = "none"

    def begin_step(self, request: DenoisingRequest) -> None:
        request.validity.invalidate(0)
