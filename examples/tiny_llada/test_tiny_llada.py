# SPDX-License-Identifier: Apache-2.0
"""Checks of the generator, the tokenizer, the masks and the decoder: `pytest examples/tiny_llada`.

They take seconds and need no checkpoint.
"""

# ruff: noqa: D103 (test names say what they test)

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import batches
import tasks
import tokenizer as tokenizers
import train
from evaluate import decode
from export import export
from model import Shape, TinyLLaDA, load


@pytest.fixture(scope="module")
def tokens():
    return tokenizers.build()


@pytest.mark.parametrize("prompt_tokens", [None, 900], ids=["short", "long"])
@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_problems_are_reproducible_held_out_and_within_the_vocabulary(task, prompt_tokens, tokens):
    first = list(tasks.problems(task, 3, 5, prompt_tokens))
    assert first == list(tasks.problems(task, 3, 5, prompt_tokens))
    for problem in first:
        assert tasks.is_held_out(problem.question)
        assert problem.check(problem.answer) and not problem.check(problem.answer + " 1")
        text = tokens.apply_chat_template(
            problem.messages(), tokenize=False, add_generation_prompt=True
        )
        ids = tokens.encode(text)
        assert tokens.unk_token_id not in ids
        assert prompt_tokens is None or 700 <= len(ids) <= prompt_tokens
        answer = tokens.encode(problem.answer)
        assert tokens.decode(answer) == problem.answer
        assert len(answer) < batches.CANVAS


def test_training_never_sees_a_held_out_question():
    rng = random.Random(0)
    for _ in range(200):
        _, turns = tasks.conversation(rng, 0.3, 0.3, 0.25)
        assert not any(tasks.is_held_out(question) for question, _ in turns)


@pytest.mark.parametrize("task", list(tasks.TASKS))
def test_answers_follow_from_questions(task):
    for problem in tasks.problems(task, 5, 10):
        question, answer = problem.question.split(), problem.answer.split()
        if task == "table":
            end = question.index(".")
            rows = dict(zip(question[2:end:2], question[3:end:2], strict=True))
            asked = question[end + 2 :]
            assert answer[::2] == asked and answer[1::2] == [rows[name] for name in asked]
        elif task == "chain":
            end = question.index(".")
            arrows = dict(zip(question[0:end:4], question[2:end:4], strict=True))
            path = answer[::2]
            assert [path[0], path[-1]] == [question[end + 3], question[-1]]
            assert all(arrows[a] == b for a, b in itertools.pairwise(path))
        elif task == "walk":
            x, y = int(question[2]), int(question[3])
            for move, place in zip(
                question[6::2], zip(answer[1::3], answer[2::3], strict=True), strict=True
            ):
                x, y = (x + tasks.MOVES[move][0]) % 10, (y + tasks.MOVES[move][1]) % 10
                assert (x, y) == (int(place[0]), int(place[1]))
        elif task == "running":
            totals = itertools.accumulate(map(int, question[6::2]))
            assert list(map(int, answer[1::2])) == [total % 10 for total in totals]
        elif task == "word":
            assert all(0 <= int(count) <= 12 for count in answer[6::5])
            assert answer[-2:] == ["####", answer[-3]]


def test_masks_weigh_every_answer_token_alike_in_expectation():
    item = batches.Sequence(0, list(range(40)), [(10, 20), (25, 40)])
    noise = np.random.default_rng(0)
    total = np.zeros(44)
    mix = batches.Mix(0, 0, 0, 0, ordered=0.0, numbers=0.0)
    for _ in range(4000):
        masked, weights, frontier = batches.mask(noise, item, 44, noise.random(), mix)
        assert frontier == -1 and not masked[:10].any() and not masked[20:25].any()
        assert not weights[~masked].any()
        total += weights / 4000
    assert np.allclose(total[10:20], 1, atol=0.15) and np.allclose(total[25:40], 1, atol=0.15)
    assert np.allclose(total[40:], batches.PAD_WEIGHT, atol=0.02)


def test_pool_depends_on_seed_and_step_only():
    one, two = (
        batches.pool(1, 4, 1500, batches.Mix(0.3, 0.3, 0.25, 0.1, 0.3, 0.2), 1000) for _ in range(2)
    )
    assert one[1] == two[1]
    for a, b in zip(one[0], two[0], strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.weights, b.weights)


@pytest.fixture
def small_model():
    torch.manual_seed(0)
    model = TinyLLaDA(Shape(64, 64, d_model=64, n_heads=2, n_layers=2, mlp_hidden_size=64))
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("threshold", [0.4, 1.0])
def test_decoding_in_a_batch_equals_decoding_alone(small_model, threshold):
    prompts = [list(range(2, n)) for n in (5, 9, 20)]
    together = decode(small_model, prompts, 12, 4, threshold, (1, 0), batch=3)
    alone = [decode(small_model, [p], 12, 4, threshold, (1, 0), batch=1)[0] for p in prompts]
    assert together == alone
    if threshold == 1.0:
        assert all(len(ids) <= steps <= 12 for ids, steps in together)


def test_export_can_be_loaded(small_model, tmp_path):
    export(tmp_path / "checkpoint", small_model.shape, dict(small_model.named_parameters()))
    again = load(tmp_path / "checkpoint")
    ids = torch.arange(10)[None]
    assert torch.equal(again(ids), small_model.eval()(ids))


@pytest.mark.parametrize(
    ("words", "until"), [([], 90), (["--minutes", "5"], 5), (["--minutes", "5", "--until", "2"], 2)]
)
def test_training_ends_with_its_schedule_unless_told_otherwise(words, until, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run", "folder", *words])
    assert train.parse().until == until


@pytest.mark.parametrize("wait", [True, False], ids=["wait", "background"])
def test_launching_waits_for_the_end_only_if_told_to(wait, tmp_path):
    """The recipe's stages follow one another in one folder."""
    python, ends = tmp_path / "python", tmp_path / "ends"
    python.write_text(
        f'#!/bin/sh\nwhile [ ! -e "{ends}" ]; do sleep 0.05; done\necho "$*"\nexit 3\n'
    )
    python.chmod(0o755)
    run, launch = tmp_path / "run", Path(__file__).parent / "launch.sh"
    words = ["--wait"] if wait else []
    launched = subprocess.Popen(
        [launch, *words, run, "--minutes", "5"], env=os.environ | {"PYTHON": str(python)}
    )
    if wait:
        with pytest.raises(subprocess.TimeoutExpired):
            launched.wait(0.3)
        ends.touch()
        assert launched.wait(20) == 3
        assert (run / "out.log").read_text().rstrip().endswith("--minutes 5")
    else:
        assert launched.wait(20) == 0
        ends.touch()
