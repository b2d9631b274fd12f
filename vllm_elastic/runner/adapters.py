# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA): vLLM loads them and wraps the layers; what they add to a pass's rows is here.

vLLM tells its kernels once a pass which adapter each token has. Here a pass has several sets of
rows: those of each join layer, tested ones once more, the window's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn
from torch.nn.functional import linear
from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
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
        """Of the rows that layers work on next."""
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
        """The same for logits [R, vocabulary filled up] of rows [R, d]."""
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
            own, inner = y[start:stop], linear(x[start:stop].to(a.dtype), a[slot, 0])
            if own.dtype == inner.dtype:
                own.addmm_(inner, b[slot, 0].T)
            else:
                own.add_(linear(inner, b[slot, 0]))
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
    """Of one pass.

    Args:
        slots: int64 [plans].
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


class _Manager(LRUCacheLoRAModelManager):
    """Adapters of one model, in its slots and on the host."""

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: VllmConfig) -> None:
        self.supports_mm = False
        self.products = Products()
        self.punica_wrapper_mapping = {DEFAULT_LANGUAGE_WRAPPER_KEY: self.products}

    def _create_lora_modules(self) -> None:
        super()._create_lora_modules()
        for module in self.modules.values():
            if isinstance(module, BaseLinearLayerWithLoRA):
                module.lora_a_stacked = Slices.of_a(module.lora_a_stacked)
                module.lora_b_stacked = Slices.of_b(module.lora_b_stacked)

    def _add_adapter(self, lora: LoRAModel) -> None:
        """Raises:
        ValueError: a part of the adapter is of no layer here; vLLM leaves it out silently.
        """
        known = set(self.modules)
        for packed, parts in self.packed_modules.items():
            known.discard(packed)
            known.update(parts)
        strange = [name for name in lora.loras if name not in known]
        if strange:
            raise ValueError(
                f"the adapter changes {strange[0]!r}, which {type(self.model).__name__} does not "
                f"have or does not let adapters change ({len(strange)} of its {len(lora.loras)} "
                "layers). Was it trained on another architecture? (vllm_elastic)"
            )
        if (head := lora.loras.get("lm_head")) is not None:
            # A checkpoint's head may have more rows than there are tokens.
            head.lora_b = head.lora_b[: self.vocab_size]
        super()._add_adapter(lora)

    def activate_adapter(self, lora_id: int) -> bool:
        activated = super().activate_adapter(lora_id)
        if activated:
            slot = self.lora_index_to_id.index(lora_id)
            self.products.of_head.discard(slot)
            if "lm_head" in self.list_adapters()[lora_id].loras:
                self.products.of_head.add(slot)
        return activated


class _WorkerManager(LRUCacheWorkerLoRAManager):
    _manager_cls = _Manager


class Adapters:
    """An engine's adapters; wraps the model's layers.

    Args:
        model: a ``DiffusionTransformer`` with its weights.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig, device: torch.device) -> None:
        self._worker = _WorkerManager(vllm_config, device, model.embedding_modules)
        self._worker.create_lora_manager(model, vllm_config)
        self._manager: _Manager = model.lora_manager
        self._device = device

    def activate(self, plans: Sequence[PassPlan]) -> dict[int, str]:
        """Have the adapters of a pass's plans in slots.

        Returns:
            why an adapter could not be loaded (again: it made room for others), by the plan's
            index.
        """
        wanted: dict[int, LoRARequest] = {
            plan.adapter.lora_int_id: plan.adapter for plan in plans if plan.adapter is not None
        }
        faults: dict[int, str] = {}
        while True:
            # In one order on all ranks.
            left = [adapter for number, adapter in sorted(wanted.items()) if number not in faults]
            fault = next(filter(None, map(self._fault_of, left)), None)
            if fault is None:
                break
            faults |= fault
        return {
            index: faults[plan.adapter.lora_int_id]
            for index, plan in enumerate(plans)
            if plan.adapter is not None and plan.adapter.lora_int_id in faults
        }

    def _fault_of(self, adapter: LoRARequest) -> dict[int, str] | None:
        """Why an adapter gets no slot, by its number; ranks ask each other only about a new one."""
        try:
            if adapter.lora_int_id in self._manager.lora_index_to_id:
                # One that is to be loaded in place was when it was added: not in every pass.
                self._worker.add_adapter(replace(adapter, load_inplace=False))
            else:
                self.add(adapter)
        except Exception as error:  # whatever files and their readers come up with
            return {adapter.lora_int_id: str(error)}
        return None

    def of_pass(self, plans: Sequence[PassPlan]) -> PassAdapters | None:
        """After ``activate``; None: the pass has none."""
        self._manager.products.use(())
        slot_of = {adapter: slot for slot, adapter in enumerate(self._manager.lora_index_to_id)}
        ids = [0 if plan.adapter is None else plan.adapter.lora_int_id for plan in plans]
        slots = np.array([slot_of.get(adapter, -1) for adapter in ids], dtype=np.int64)
        if (slots < 0).all():
            return None
        return PassAdapters(slots, self._manager.products)

    def of_trial(self, num_rows: int) -> SlotRuns:
        """What takes the most memory: one adapter for all rows."""
        return SlotRuns(np.zeros(num_rows, dtype=np.int64), self._manager.products)

    # Asked by vLLM's worker.

    def add(self, request: LoRARequest) -> bool:
        """Load an adapter, unless it is there, and give it a slot. Called on all ranks.

        Raises:
            Exception: whatever is wrong with it, on this rank or another one.
        """
        added, error = False, None
        try:
            added = self._worker.add_adapter(request)
        except Exception as found:
            error = found
        failed = torch.tensor([float(error is not None)], device=self._device)
        if not ranks.add_up([failed])[0].item():
            return added
        if ranks.count() == 1:
            self._worker.remove_adapter(request.lora_int_id)
        else:  # on some ranks others have made room: all begin anew, else they would differ
            self.forget()
        raise error or RuntimeError(
            f"another rank could not load the adapter {request.lora_name} from {request.lora_path}"
        )

    def remove(self, adapter: int) -> bool:
        return self._worker.remove_adapter(adapter)

    def pin(self, adapter: int) -> bool:
        return self._worker.pin_adapter(adapter)

    def ids(self) -> set[int]:
        return self._worker.list_adapters()

    def forget(self) -> None:
        """All of them: the weights that they belong to are gone."""
        self._worker.remove_all_adapters()
