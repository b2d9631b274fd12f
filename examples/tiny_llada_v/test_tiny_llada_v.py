# SPDX-License-Identifier: Apache-2.0
"""Checks of pictures, questions, tokens, masks and weights: `pytest examples/tiny_llada_v`.

They take seconds and need no checkpoint.
"""

# ruff: noqa: D103 (test names say what they test)

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import learn
import lessons
import publish
import questions
import seeing
import shown
import vocabulary
from pictures import SIDE, SQUARES, board, draw


@pytest.fixture(scope="module")
def tokens():
    return vocabulary.build()


@pytest.fixture(scope="module")
def model():
    return learn.make_model(1)


def test_the_tiny_lladas_ids_are_kept():
    from tokenizer import vocabulary as trained

    ids = vocabulary.vocabulary()
    assert {word: ids[word] for word in trained()} == trained()


def test_problems_are_reproducible_held_out_and_within_the_vocabulary(tokens):
    first = list(questions.problems(3, 8))
    for problem, again in zip(first, questions.problems(3, 8), strict=True):
        assert (problem.question, problem.answer) == (again.question, again.answer)
        assert problem.image.tobytes() == again.image.tobytes()
        assert problem.check(problem.answer) and not problem.check(problem.answer + " 1")
        answer = tokens.encode(problem.answer)
        assert tokens.unk_token_id not in tokens.encode(problem.question) + answer
        assert tokens.decode(answer) == problem.answer
        assert 30 < len(answer) < lessons.CANVAS
    assert {problem.kind for problem in first} == set(questions.QUESTIONS)


def test_training_never_sees_a_held_out_board():
    rng = random.Random(0)
    boards = [questions.some_board(rng, held_out=False) for _ in range(100)]
    assert not any(questions.is_held_out(things) for things in boards)
    assert questions.is_held_out(questions.some_board(rng, held_out=True))


def test_answers_say_what_is_on_the_board():
    rng = random.Random(1)
    things = board(rng)
    where = dict(zip(SQUARES, things, strict=True))
    assert len(set(things)) == len(SQUARES) == SIDE**2
    for kind in ("read", "name"):
        words = questions.QUESTIONS[kind](things, rng, False)[1].split()
        named = list(zip(words[::3], zip(words[1::3], words[2::3], strict=True), strict=True))
        assert all(where[square] == thing for square, thing in named)
    words = questions.locate(things, rng, False)[1].split()
    assert all(
        where[square] == thing
        for *thing, square in zip(words[::3], words[1::3], words[2::3], strict=True)
        for thing in [tuple(thing)]
    )
    question, answer = questions.count(things, rng, False)
    kind = question.split()[1]
    assert answer.split()[-1] == str(sum(kind in thing for thing in things))


def test_prompt_is_the_chat_templates(tokens, model):
    """With as many placeholders as a picture has positions in the place of one."""
    content = [{"type": "image"}, {"type": "text", "text": "Read row 3 ."}]
    text = tokens.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    ids = tokens.encode(text.replace("<image>", vocabulary.IMAGE))
    assert ids == lessons.prompt_ids("Read row 3 .", 1)
    assert lessons.prompt_ids("", model.positions).count(model.image_token) == model.positions


def test_lessons_hide_answers_only(model):
    share = lessons.Share(0.5, 0.5, dict.fromkeys(questions.QUESTIONS, 1.0))
    mix = lessons.Mix(0.5, 0, 0, 0.2, 0.4, 0.1)
    sizes = (model.positions, model.tower_shape.image_size)
    batches, count = lessons.pool(1, 2, 2000, share, mix, 1000, sizes)
    again, _ = lessons.pool(1, 2, 2000, share, mix, 1000, sizes)
    assert count > 0
    for batch, same in zip(batches, again, strict=True):
        assert torch.equal(batch.inputs, same.inputs) and torch.equal(batch.tiles, same.tiles)
        assert ((batch.inputs == model.image_token).sum(1) == model.positions).all()
        hidden = batch.inputs.flatten()[batch.positions]
        assert (hidden == lessons.MASK).all() and (batch.weights > 0).all()
        told = batch.targets[batch.told >= 0]
        assert all(int(token) in set().union(*lessons.TOLD.values()) for token in told)


def test_a_patch_starts_as_its_square(model):
    """Of a tower that has seen nothing: where it is, as the projector writes it."""
    with torch.no_grad():
        (rows,) = model.rows(torch.zeros(1, 3, 96, 96))
        squares = model.meaning(learn.SEEN)[: len(SQUARES)]
    likeness = torch.cosine_similarity(rows[:, None, 1:], squares[None, :, 1:], dim=-1)
    assert likeness.argmax(1).tolist() == list(range(len(SQUARES)))


def test_pictures_enter_the_canvas_twice(model):
    rows = torch.randn(2, SIDE**2, model.shape.d_model)
    canvas = model.on_canvas(rows)
    assert canvas.shape[1] == model.positions
    assert torch.equal(canvas[:, : SIDE**2], rows)
    grid = canvas[:, SIDE**2 :].view(2, SIDE, SIDE + 1, -1)
    assert torch.equal(grid[:, :, :SIDE].flatten(1, 2), rows)
    assert (grid[:, :, SIDE] == model.newline).all()


def test_what_is_published_is_loaded_again(model, tmp_path):
    folder = tmp_path / "checkpoint"
    publish.publish(folder, model.shape, model.tower_shape, model.state_dict())
    loaded = seeing.load(folder)
    tile = seeing.tile(draw(board(random.Random(2)), random.Random(2)), 96)[None]
    ids = torch.tensor([lessons.prompt_ids("Read row 1 .", model.positions)])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids, tile), model(ids, tile))


@pytest.mark.parametrize("make", [shown.things_to_find, shown.words_to_compare])
def test_looking_reaches_tower_and_heads(make, model):
    lessons = make(model, random.Random(0), 2)
    assert all(lessons.ids[canvas][position] == shown.MASK for canvas, position, _ in lessons.told)
    loss, right = shown.loss_of_looking(model, lessons)
    loss.backward()
    block = model.language.model["transformer"]["blocks"][lessons.heads[-1][0]]
    for weight in (block.q_proj.weight, model.tower.embeddings["patch_embedding"].weight):
        assert weight.grad.abs().sum() > 0
    assert 0 <= float(right) <= 1
    model.zero_grad()
