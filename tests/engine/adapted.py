# SPDX-License-Identifier: Apache-2.0
"""A model, adapters of it, an engine that serves them, and oracles with each one merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from vllm.lora.request import LoRARequest

from tests.adapters import write_adapter
from vllm_elastic.reference import LLaDA

from .agreement import agrees
from .conftest import Served, make_engine
from .test_oracle import CONFIGS, ask_oracle, problems


def everything(layer: str) -> bool:
    return "wte" not in layer and "embed_tokens" not in layer


def as_d1(layer: str) -> bool:
    """What d1's configuration of PEFT matches in a LLaDA: no output projection, no down."""
    return layer.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "up_proj")


def weights_of(oracle: Any) -> dict[str, torch.Tensor]:
    """By their checkpoint's names; a head that is the embedding is left out."""
    if not hasattr(oracle, "model"):
        return dict(oracle.weights)
    weights = oracle.model.state_dict()
    tied = ("lm_head.weight",) if oracle.config.weight_tying else ()
    return {name: weight for name, weight in weights.items() if name not in tied}


def with_weights(oracle: Any, changed: dict[str, torch.Tensor]) -> Any:
    """The oracle with some weights replaced."""
    if hasattr(oracle, "model"):
        other = copy.deepcopy(oracle)
        other.model.load_state_dict(changed, strict=False)
        return other
    return LLaDA(oracle.config, oracle.weights | changed)


class Adapted:
    """A model, three adapters of it, and an engine that has slots for two.

    Attributes:
        served: by the adapter's number; 0 is the model as it is.
    """

    def __init__(self, served: Served, directory: Path, **options: Any) -> None:
        first = write_adapter(directory / "first", weights_of(served.oracle), everything, seed=1)
        second = write_adapter(
            directory / "second", weights_of(served.oracle), as_d1, rank=8, alpha=8, seed=2
        )
        third = write_adapter(
            directory / "third", weights_of(served.oracle), everything, rank=2, seed=3
        )
        self.served = {
            0: served,
            **{
                number: Served(
                    f"{served.name}-{number}",
                    served.directory,
                    with_weights(served.oracle, changed),
                    None,
                )
                for number, changed in enumerate((first, second, third), 1)
            },
        }
        self.directory = directory
        self.engine = make_engine(
            served.directory, enable_lora=True, max_loras=2, max_cpu_loras=2, **options
        )

    def request(self, number: int) -> LoRARequest | None:
        name = [None, "first", "second", "third"][number]
        return None if name is None else LoRARequest(name, number, str(self.directory / name))

    def compare(self, cases: list[tuple[int, str, int]], **knobs: Any) -> None:
        """Serve cases of prompt, configuration and adapter at once, against the oracles."""
        asked = []
        for index, name, adapter in cases:
            prompt, max_tokens = problems()[index]
            own = {f"elastic_{key}": value for key, value in (CONFIGS[name] | knobs).items()}
            asked.append(
                {"prompt_token_ids": prompt, "max_tokens": max_tokens, **own}
                | {"lora_request": self.request(adapter)}
            )
        results = self.engine.run(asked)
        equal = []
        for (index, name, adapter), result in zip(cases, results, strict=True):
            prompt, max_tokens = problems()[index]
            config = CONFIGS[name] | knobs
            expected = ask_oracle(self.served[adapter], prompt, max_tokens, config)
            equal.append(agrees(result, expected, (index, name, adapter)))
        assert equal.count(False) <= len(cases) / 100
