# SPDX-License-Identifier: Apache-2.0
"""Adapters (LoRA): the engine against an oracle whose weights have them merged, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from tests.adapters import write_adapter
from tests.documented_commands import ROOT, blocks

from .adapted import Adapted, as_d1, everything, weights_of
from .conftest import Served
from .random_families import save_family
from .test_oracle import CONFIGS, ask_oracle, problems, request
from .test_transfers import Operators

pytestmark = pytest.mark.engine

MODELS = ["mha-head64", pytest.param("dream", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def adapt(
    serve: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Adapted]:
    made: dict[str, Adapted] = {}

    def make(name: str) -> Adapted:
        if name not in made:
            made[name] = Adapted(serve(name), tmp_path_factory.mktemp(f"{name}-adapters"))
        return made[name]

    return make


@pytest.mark.parametrize("model", MODELS)
def test_a_mixed_batch_equals_the_oracle(model: str, adapt: Callable[[str], Adapted]) -> None:
    """Every policy, with no adapter, and with three of which two have a slot at a time."""
    cases = [
        (index, name, (index + number) % 4)
        for number, name in enumerate(CONFIGS)
        for index in range(number % 4, 32, 16)
    ]
    adapt(model).compare(cases)


def test_every_adapter_answers_otherwise(adapt: Callable[[str], Adapted]) -> None:
    """Else the test above would pass with one adapter taken for another."""
    prompt, _ = problems()[0]
    answers = [
        tuple(ask_oracle(served, prompt, 16, CONFIGS["none"]).token_ids)
        for served in adapt("mha-head64").served.values()
    ]
    assert len(set(answers)) == 4


def test_answers_that_grow(tmp_path: Path) -> None:
    """iLLaDA's, under a Llama's names."""
    oracle = save_family("illada", tmp_path)
    adapted = Adapted(Served("illada", tmp_path, oracle, None), tmp_path)
    names = ["none", "released-high", "block-fine"]
    adapted.compare([(i, name, i % 3) for name in names for i in range(6)], grow_by=8)


@pytest.mark.slow
def test_a_canvas_beyond_the_row_budget(
    serve: Callable[[str], Served], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Row chunks: an adapter's rows are counted from each chunk's first."""
    adapted = Adapted(serve("gqa-tied"), tmp_path_factory.mktemp("chunks"), row_budget=24)
    names = ["none", "released-high", "paper-low", "block-fine"]
    adapted.compare([(index, name, index % 3) for name in names for index in range(6)])


def test_one_that_waits_for_a_slot_holds_nobody_up(adapt: Callable[[str], Adapted]) -> None:
    """Two slots: the third adapter's request waits, those behind it do not."""
    adapted = adapt("mha-head64")
    scheduler = adapted.engine.scheduler
    plan_step, together = scheduler._plan_step, []
    deferred: list[int] = []

    def planned() -> Any:
        plans = plan_step()
        together.append({plan.adapter and plan.adapter.lora_name for plan in plans})
        deferred.append(len(scheduler.deferred_waiting))
        return plans

    scheduler._plan_step = planned
    try:
        adapted.compare([(4, "none", 1), (9, "none", 2), (14, "none", 3), (19, "none", 0)])
    finally:
        del scheduler._plan_step
    assert {"first", "second", None} in together
    assert not any({"first", "second", "third"} <= names for names in together)
    assert (deferred[0], deferred[-1]) == (1, 0)


def test_without_an_adapter_a_pass_costs_what_it_did(
    serve: Callable[[str], Served], adapt: Callable[[str], Adapted]
) -> None:
    """Operators of whole answers, on an engine with slots and on one without. How keys are read
    depends on which KV blocks are free."""
    of_reading = {"alias", "copy_", "slice"}
    counts = []
    for engine in (adapt("mha-head64").engine, serve("mha-head64").engine):
        with Operators() as operators:
            engine.run([request(3, "block"), request(8, "released-high")])  # type: ignore[attr-defined]
        counts.append({k: n for k, n in operators.counts.items() if k not in of_reading})
    assert counts[0] == counts[1]


def test_an_adapter_is_read_once(
    adapt: Callable[[str], Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that replaces another of its name, too: not again in every pass."""
    adapted = adapt("mha-head64")
    loaded = []
    load = LRUCacheWorkerLoRAManager._load_adapter

    def counted(self: Any, asked: Any) -> Any:
        loaded.append(asked.lora_name)
        return load(self, asked)

    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", counted)
    path = str(adapted.directory / "first")
    inplace = LoRARequest("first", 1, path, load_inplace=True)
    adapted.engine.llm.llm_engine.add_lora(inplace)
    for _ in range(2):
        adapted.engine.run([request(3, "none") | {"lora_request": inplace}])
    assert loaded == ["first"]


def test_weights_that_are_loaded_again(adapt: Callable[[str], Adapted]) -> None:
    """Under the layers that adapters wrap; adapters are read anew."""
    adapted = adapt("mha-head64")
    adapted.engine.runner.reload_weights(weights_path=str(adapted.served[0].directory))
    assert adapted.engine.runner.list_loras() == set()
    adapted.compare([(index, "block", index % 3) for index in range(6)])


def test_refused_adapters(adapt: Callable[[str], Adapted], tmp_path: Path) -> None:
    """The engine goes on, and says what is wrong and where."""
    adapted = adapt("mha-head64")
    oracle = adapted.served[0].oracle
    llamas = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(192, 192)}
    write_adapter(tmp_path / "llama", llamas, everything)
    write_adapter(tmp_path / "wide", weights_of(oracle), as_d1, rank=32)
    write_adapter(tmp_path / "embedding", weights_of(oracle), lambda layer: "wte" in layer)
    add = adapted.engine.llm.llm_engine.add_lora
    for name, message in {
        "llama": "changes 'model.layers.0.self_attn.q_proj', which LLaDAModelLM does not have",
        "wide": "LoRA rank 32 is greater than max_lora_rank 16",
        "embedding": "embed_tokens",
        "nowhere": "nowhere",
    }.items():
        with pytest.raises(Exception, match=f"(?s){message}"):
            add(LoRARequest(name, 9, str(tmp_path / name)))
    adapted.compare([(2, "none", 1), (3, "none", 0)])


def test_an_adapter_that_is_gone_ends_its_requests_alone(
    adapt: Callable[[str], Adapted], caplog: pytest.LogCaptureFixture
) -> None:
    """It made room for others, and its files are no longer there when it is wanted again."""
    adapted = adapt("mha-head64")
    gone = LoRARequest("gone", 8, str(adapted.directory / "gone"))
    asked: list[dict[str, Any]] = [request(4, "none"), request(9, "none"), request(14, "none")]
    asked[0]["lora_request"], asked[2]["lora_request"] = adapted.request(1), gone
    params = [SamplingParams(max_tokens=each["max_tokens"], detokenize=False) for each in asked]
    outputs = adapted.engine.llm.generate(
        [{"prompt_token_ids": each["prompt_token_ids"]} for each in asked],
        params,
        lora_request=[each.get("lora_request") for each in asked],
    )
    assert [output.outputs[0].finish_reason for output in outputs] == ["length", "length", "error"]
    assert "gone" in caplog.text and "is ended with an error" in caplog.text


def test_documented_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python block of docs/adapters.md, and what the trained adapter answers."""
    monkeypatch.chdir(ROOT)
    (block,) = (b for b in blocks([ROOT / "docs" / "adapters.md"]) if b.language == "python")
    question = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
    names: dict[str, Any] = {
        "prompts": [f"<|user|>{question}"],
        "params": SamplingParams(temperature=0.0, max_tokens=4),
    }
    exec(block.text, names)
    messages = [{"role": "user", "content": question}]
    asked = [None, names["LoRARequest"]("terse", 1, "examples/tiny_llada/terse")]
    params = SamplingParams(temperature=0.0, max_tokens=64)
    answers = names["llm"].chat([messages] * 2, params, lora_request=asked)
    said = [answer.outputs[0].text.strip() for answer in answers]
    assert said == ["fig 91 jet 40 pin 62", "91 40 62"]


def test_an_adapter_on_an_engine_that_takes_none(
    serve: Callable[[str], Served], adapt: Callable[[str], Adapted]
) -> None:
    asked = adapt("mha-head64").request(1)
    engine: Any = serve("mha-head64").engine
    with pytest.raises(Exception, match="LoRA is not enabled"):
        engine.run([request(3, "none") | {"lora_request": asked}])
    with pytest.raises(Exception, match=r"start with --enable-lora \(vllm_elastic\)"):
        engine.llm.llm_engine.add_lora(asked)
    assert len(engine.run([request(3, "none")])) == 1
