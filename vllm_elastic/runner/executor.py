# SPDX-License-Identifier: Apache-2.0
"""How a pass is run on the device. The numbers are the same, whichever executor runs it."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from vllm_elastic.models.rows import PassRows, Recorder


class PassExecutor(Protocol):
    """Runs the model's forward over the rows of a pass."""

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        """Final normed hidden states [W, d] of the window's rows; fills the recorder."""
        ...


class EagerExecutor:
    """Operator by operator, as the model is written.

    Args:
        model: a ``DiffusionTransformer``.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, rows: PassRows, recorder: Recorder | None) -> torch.Tensor:
        hidden: torch.Tensor = self._model.run(rows, recorder)
        return hidden
