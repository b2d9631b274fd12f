# SPDX-License-Identifier: Apache-2.0
"""What adapters (LoRA) add to a pass's rows: two products for each run of rows with one adapter.

vLLM tells its kernels once a pass which adapter each token has. Here a pass has several sets of
rows: those of each join layer, tested ones once more, the window's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear

from vllm_elastic.runner.row_order import IntArray

Run = tuple[int, int, int]
"""A slot, and the rows [start, stop) that its adapter is added for."""


class Products:
    """What wrapped layers ask for their adapters' part: vLLM's "punica wrapper" in another way.

    vLLM's for CPUs gathers an adapter's matrices anew for every row, and takes the last slot's for
    rows that have no adapter. Here an adapter multiplies neighbours at once.
    """

    def __init__(self) -> None:
        self._runs: Sequence[Run] = ()
        self.of_head: set[int] = set()  # slots whose adapter changes the head; most do not

    def use(self, runs: Sequence[Run]) -> None:
        """Layers work on rows next that have these runs."""
        self._runs = runs

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: Slices,
        lora_b_stacked: Slices,
        scale: float,
        output_slices: Sequence[int],
        **_: Any,
    ) -> torch.Tensor:
        """Add to a layer's output [R, out], in place, what its rows' adapters add.

        Args:
            x: [R, in], the layer's input.
            scale: always 1: an adapter's own is in its matrices.
            output_slices: how many of the outputs are of each of the layer's parts.
        """
        return self._add(self._runs, y, x, lora_a_stacked.whole, lora_b_stacked.whole)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        **_: Any,
    ) -> torch.Tensor:
        """Add to logits [R, vocabulary filled up] of rows [R, d], in place, what adapters add."""
        runs = [run for run in self._runs if run[0] in self.of_head]
        if runs:
            self._add(runs, y[:, : lora_b_stacked.shape[2]], x, lora_a_stacked, lora_b_stacked)
        return y

    def _add(
        self,
        runs: Sequence[Run],
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        """Args:
        a: [slots, 1, rank, in]; b: [slots, 1, out, rank].
        """
        for slot, start, stop in runs:
            outputs, inner = y[start:stop], linear(x[start:stop].to(a.dtype), a[slot, 0])
            if outputs.dtype == inner.dtype:
                outputs.addmm_(inner, b[slot, 0].T)
            else:
                outputs.add_(linear(inner, b[slot, 0]))
        return y


class Slices(tuple[torch.Tensor, ...]):
    """The adapters' matrices of a fused layer's parts, as vLLM fills them: views of one tensor.

    Attributes:
        whole: of A [slots, 1, parts * rank, in]; of B [slots, 1, out, parts * rank], zero where a
            part's output meets another one's rank. So a layer takes two products, not two a part.
            On a CPU float32: in bfloat16 products of so few columns take several times as long.
    """

    whole: torch.Tensor

    @classmethod
    def of_a(cls, parts: Sequence[torch.Tensor]) -> Slices:
        whole = torch.cat(list(parts), dim=2).to(cls._type_of(parts[0]))
        return cls._of(whole, whole.split([part.shape[2] for part in parts], dim=2))

    @classmethod
    def of_b(cls, parts: Sequence[torch.Tensor]) -> Slices:
        num_out, rank = sum(part.shape[2] for part in parts), parts[0].shape[3]
        shape = len(parts[0]), 1, num_out, len(parts) * rank
        whole = parts[0].new_zeros(shape, dtype=cls._type_of(parts[0]))
        rows = whole.split([part.shape[2] for part in parts], dim=2)
        return cls._of(whole, [part.split(rank, dim=3)[i] for i, part in enumerate(rows)])

    @classmethod
    def _of(cls, whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> Slices:
        slices = cls(parts)
        slices.whole = whole
        return slices

    @staticmethod
    def _type_of(part: torch.Tensor) -> torch.dtype:
        return torch.float32 if part.device.type == "cpu" else part.dtype


class SlotRuns:
    """Runs of rows whose adapter is in one slot (``models.rows.RowAdapters``).

    Args:
        slots: int64 [R], each row's slot; -1: none.
    """

    def __init__(self, slots: IntArray, products: Products) -> None:
        ends = [*(np.flatnonzero(np.diff(slots)) + 1).tolist(), len(slots)]
        runs = zip(slots[np.array(ends) - 1].tolist(), [0, *ends], ends, strict=False)
        self._runs = [run for run in runs if run[0] >= 0]
        self._products = products

    def use(self, start: int, stop: int) -> None:
        """Layers work on rows [start, stop) next."""
        self._products.use(
            [
                (slot, max(first, start) - start, min(last, stop) - start)
                for slot, first, last in self._runs
                if first < stop and last > start
            ]
        )


class PassAdapters:
    """The adapters of a pass's plans.

    Args:
        slots: int64 [plans], each plan's slot; -1: none.
    """

    def __init__(self, slots: IntArray, products: Products) -> None:
        self._slots, self._products = slots, products

    def of_rows(self, owners: IntArray, num_rows: int) -> SlotRuns:
        """Args:
        owners: int64 [R], the plan that each row is of.
        num_rows: R filled up; what fills up goes with the last row.
        """
        slots = np.full(num_rows, self._slots[owners[-1]])
        slots[: len(owners)] = self._slots[owners]
        return SlotRuns(slots, self._products)
