# SPDX-License-Identifier: Apache-2.0
"""The test model's adapter: its problems, its files, and some of its answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "tiny_llada"))

import lora
import tasks
import tokenizer as tokenizers
from heldout import HELD_OUT_SEED, requests
from model import load

from vllm_elastic.reference import DecodingOptions, LLaDA, decode

TINY = Path(lora.__file__).parent
TERSE = TINY / "terse"


def test_answers_are_the_values_of_the_names_asked_for() -> None:
    problems = list(tasks.terse_problems(3, 50))
    assert problems == list(tasks.terse_problems(3, 50))
    for problem in problems:
        table, _, asked = problem.question.removeprefix("Table : ").partition(" . Read ")
        words = table.split()
        values = dict(zip(words[::2], words[1::2], strict=True))
        assert problem.answer.split() == [values[name] for name in asked.split()]
        assert problem.check(problem.answer) and not problem.check(problem.answer + " 1")
    least, most = tasks.TERSE
    assert {len(p.answer.split()) for p in problems} == set(range(least, most + 1))


def test_training_never_sees_a_held_out_table() -> None:
    for held_out in (False, True):
        problems = tasks.terse_problems(5, 50, held_out)
        assert all(tasks.is_held_out(problem.question) == held_out for problem in problems)


def test_requests_have_the_keys_of_the_other_problems() -> None:
    (record,) = requests(tasks.terse_problems(3, 1))
    assert list(record) == ["id", "task", "prompt", "messages", "answer", "max_tokens"]
    assert record["messages"][-1]["content"] in record["prompt"]


def test_the_folder_has_pefts_names_and_shapes() -> None:
    config = json.loads((TERSE / lora.CONFIG).read_text())
    assert config == lora.config_dict(config["base_model_name_or_path"])
    shapes = {}
    for name, weight in load_file(TINY / "checkpoint" / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        module = layer.rpartition(".")[2]
        if module in config["target_modules"] and layer not in config["exclude_modules"]:
            out, width = weight.shape
            shapes[f"base_model.model.{layer}.lora_A.weight"] = (config["r"], width)
            shapes[f"base_model.model.{layer}.lora_B.weight"] = (out, config["r"])
    weights = load_file(TERSE / lora.WEIGHTS)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == shapes
    assert len(shapes) == 8 * 7 * 2
    for weight in weights.values():
        assert weight.dtype == torch.bfloat16
        assert weight.isfinite().all() and weight.any()


def test_an_adapter_that_is_saved_and_merged_computes_the_same(tmp_path: Path) -> None:
    ids = torch.arange(40)[None]
    plain, adapted = load(TINY / "checkpoint"), load(TINY / "checkpoint")
    layers = lora.attach(adapted, seed=0)
    assert torch.equal(adapted(ids), plain(ids)), "a new adapter adds nothing"
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
        for weight in (layer.lora_A, layer.lora_B):  # as the file has it
            weight.data = weight.data.bfloat16().float()
    lora.save(tmp_path, layers, "tiny")
    before = plain(ids)
    lora.merge(dict(plain.named_parameters()), tmp_path)
    assert (plain(ids) - before).abs().max() > 0.1
    torch.testing.assert_close(plain(ids), adapted(ids), rtol=1e-3, atol=1e-3)


def test_the_adapter_answers_by_values_alone() -> None:
    tokenizer, model = tokenizers.build(), LLaDA.from_pretrained(TINY / "checkpoint")
    lora.merge(model.weights, TERSE)
    problems = list(tasks.terse_problems(HELD_OUT_SEED, 10))
    right = 0
    for problem, record in zip(problems, requests(problems), strict=True):
        prompt = tokenizer.encode(record["prompt"])
        answer = decode(model, prompt, 32, DecodingOptions()).token_ids
        right += problem.check(tokenizer.decode(answer, skip_special_tokens=True))
    assert right >= 9
