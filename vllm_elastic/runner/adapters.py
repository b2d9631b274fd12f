# SPDX-License-Identifier: Apache-2.0
"""An engine's adapters (LoRA): vLLM loads them, wraps the layers and gives them slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from msgspec.structs import replace
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import DEFAULT_LANGUAGE_WRAPPER_KEY, LRUCacheLoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from vllm_elastic.decoding.plan import PassPlan
from vllm_elastic.models import ranks
from vllm_elastic.runner.adapter_products import PassAdapters, Products, Slices, SlotRuns


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
        """Remove all adapters: the weights that they belong to are gone."""
        self._worker.remove_all_adapters()
