# SPDX-License-Identifier: Apache-2.0
"""An engine whose tensors are on a device that is not the CPU: the oracle's answers.

What is vLLM's CPU build, and would be another's on a card, works on the host: its attention and the
metadata of it, and linear layers. All else is the engine's as it is, and mixes nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.device import ON_SECOND
from tests.second_device import SECOND, OnSecond
from vllm_elastic.runner.adapter_products import Slices
from vllm_elastic.runner.upload import Upload

from .adapted import Adapted
from .conftest import Served, poison
from .driver import Driver, prompt_of
from .test_images import Tiny, problems
from .test_images import tiny as tiny  # a fixture
from .test_oracle import CONFIGS, compare, request

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not ON_SECOND, reason="test_devices runs it in a process of its own"),
]


def on_host(value: Any) -> Any:
    return value.kept if isinstance(value, OnSecond) else value


def there(value: Any) -> Any:
    is_here = isinstance(value, torch.Tensor) and not isinstance(value, OnSecond)
    return OnSecond(value.detach()) if is_here else value


class AttentionOnHost:
    """vLLM's implementation for tensors of the host."""

    def __init__(self, impl: Any) -> None:
        self._impl = impl

    def do_kv_cache_update(self, *args: Any) -> None:
        self._impl.do_kv_cache_update(*map(on_host, args))

    def forward(self, *args: Any) -> None:
        self._impl.forward(*map(on_host, args))


class MetadataOnHost:
    """A group of attention layers, and the builder of its metadata."""

    def __init__(self, group: Any) -> None:
        self._builder = group.get_metadata_builder()

    def get_metadata_builder(self) -> MetadataOnHost:
        return self

    def build(self, common_prefix_len: int, common_attn_metadata: Any) -> Any:
        kept = {
            field.name: on_host(getattr(common_attn_metadata, field.name))
            for field in dataclasses.fields(common_attn_metadata)
        }
        for name in ("query_start_loc", "seq_lens", "block_table_tensor"):
            assert isinstance(getattr(common_attn_metadata, name), OnSecond), name
        return self._builder.build(common_prefix_len, type(common_attn_metadata)(**kept))


def move(runner: Any) -> None:
    """All that ``load_model`` and ``initialize_kv_cache`` put on the device, to the second one."""
    for module in runner.model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(there(parameter), requires_grad=False)
                moved.__dict__.update(parameter.__dict__)
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            module._buffers[name] = there(buffer)
        if "cpu_linear" in module.__dict__:
            module.cpu_linear = linear_on_host(module.cpu_linear)
    for layer in runner.model.attention_layers:
        layer.impl = AttentionOnHost(layer.impl)
    stores = [*runner.model.hidden_states, runner.model.input_states]
    for layer in [*runner.model.attention_layers, *filter(None, stores)]:
        layer.kv_cache = there(layer.kv_cache)
    runner.kv_caches = {name: there(cache) for name, cache in runner.kv_caches.items()}
    cache = runner.cache
    cache.keys, cache.hidden = there(cache.keys), there(cache.hidden)
    vars(cache.key_layout).update({k: there(v) for k, v in vars(cache.key_layout).items()})
    runner._attention_group = MetadataOnHost(runner._attention_group)
    runner.device, runner._upload = SECOND, Upload(SECOND)


def linear_on_host(linear: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *args: OnSecond(linear(*map(on_host, args)))


@pytest.mark.parametrize("model", ["gqa-tied", pytest.param("dream", marks=pytest.mark.long)])
def test_every_policy_equals_the_oracle(model: str, serve: Callable[[str], Served]) -> None:
    served = serve(model)
    engine: Any = served.engine
    move(engine.runner)
    poison(engine)
    cases = [(index, name) for index in (6, 11) for name in CONFIGS]
    compare(served, cases, engine.run([request(*case) for case in cases]))
    driver = Driver(served)
    wishes: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_p": 0.9, "top_k": 9, "min_p": 0.1, "seed": 2, "logprobs": 3},
        {"logit_bias": {5: 3.0}, "allowed_token_ids": [3, 5, 9, 20, 70], "min_tokens": 3},
    ]
    names = [driver.add(prompt_of(20, 1), 12, wish) for wish in wishes]
    driver.run()
    driver.take_records()
    assert all(driver.tokens[name] for name in names)


def test_adapters(serve: Callable[[str], Served], tmp_path: Path) -> None:
    adapted = Adapted(serve("mha-head64"), tmp_path)
    cases = [(index, name, index % 3) for index in (4, 6, 11) for name in ("none", "block")]
    adapted.compare(cases)  # loads them
    move(adapted.engine.runner)
    for module in adapted.engine.runner.model.modules():
        for name in ("lora_a_stacked", "lora_b_stacked"):
            stacked = getattr(module, name, None)
            if isinstance(stacked, Slices):
                stacked.whole = there(stacked.whole)
            elif stacked is not None:  # the head's
                setattr(module, name, there(stacked))
    poison(adapted.engine)
    adapted.compare(cases)


def test_images(tiny: Tiny) -> None:
    """They come from the host, pass through the tower, and are stored for the canvas's rows."""
    move(tiny.engine.runner)
    poison(tiny.engine)
    cases = [(problem, name) for problem in problems() for name in ("none", "block")]
    asked = [problem.request(CONFIGS[name], logits_eos_inf=True) for problem, name in cases]
    tiny.compare(cases, tiny.engine.run(asked))
