"""Five exact-match tasks whose answers are long chains of easy, dependent steps.

Knows words, not token ids. Every problem is made by a seeded generator; whether its question
belongs to the training or to the held-out half of the world is decided by a hash of its text, so
the two never meet. All text is written with one space between tokens, so that an answer decoded by
the tokenizer equals the text made here.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from words import WORDS

HELD_OUT_SHARE = 16  # one question in 16 is never trained on
TEMPLATE_TOKENS = 9  # <|startoftext|>, two headers of three, <|eot_id|>, and a spare
LONG_TABLE = (70, 110)  # entries of a table in a long prompt


@dataclass(frozen=True)
class Problem:
    """A question, its only right answer, and solved examples that stand before it."""

    id: str
    task: str
    question: str
    answer: str
    shots: tuple[tuple[str, str], ...] = field(default=())

    def messages(self) -> list[dict[str, str]]:
        """The chat that asks the question: each shot is a user and an assistant turn."""
        turns = []
        for question, answer in self.shots:
            turns.append({"role": "user", "content": question})
            turns.append({"role": "assistant", "content": answer})
        return [*turns, {"role": "user", "content": self.question}]

    def check(self, text: str) -> bool:
        """Whether `text`, decoded without special tokens, is the right answer."""
        return text.split() == self.answer.split()


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out part (one in `HELD_OUT_SHARE`)."""
    return zlib.crc32(question.encode()) % HELD_OUT_SHARE == 0


class Labels:
    """Draws words without replacement: within one problem no label stands for two things."""

    def __init__(self, rng: random.Random) -> None:
        self.left = rng.sample(WORDS, len(WORDS))

    def take(self, count: int) -> list[str]:
        """The next `count` words; `IndexError` if there are too few."""
        if count > len(self.left):
            raise IndexError(f"{count} labels wanted, {len(self.left)} left")
        taken, self.left = self.left[:count], self.left[count:]
        return taken


# (first sentence, gain, loss, last sentence)
SETTINGS = (
    ("A tram has {} riders .", "At {} {} get on .", "At {} {} get off .", "How many riders ?"),
    ("A basket holds {} apples .", "The {} adds {} .", "The {} eats {} .", "How many apples ?"),
    ("The score is {} .", "With {} we win {} .", "With {} we lose {} .", "What is the score ?"),
    (
        "Tom owns {} stickers .",
        "For {} he gets {} .",
        "For {} he gives {} .",
        "How many stickers ?",
    ),
)


def word(rng: random.Random, labels: Labels, size: int) -> tuple[str, str]:
    """A count in 0..12 that `size` events change by 1..3; one worked step an event."""
    opening, gain, loss, closing = rng.choice(SETTINGS)
    count = rng.randint(0, 12)
    story, steps = [opening.format(count)], [f"start {count}"]
    for label in labels.take(size):
        by = rng.choice([d for d in range(-3, 4) if d and 0 <= count + d <= 12])
        count += by
        story.append((gain if by > 0 else loss).format(label, abs(by)))
        steps.append(f"{label} {'+' if by > 0 else '-'} {abs(by)} = {count}")
    return " ".join([*story, closing]), " ".join([*steps, f"#### {count}"])


def table(rng: random.Random, labels: Labels, size: int, entries: int = 0) -> tuple[str, str]:
    """Look up `size` entries, in any order, of a table of `entries` numbers with names."""
    names = labels.take(max(entries, size))
    values = {name: rng.randint(0, 99) for name in names}
    asked = rng.sample(names, size)
    rows = " ".join(f"{name} {value}" for name, value in values.items())
    question = f"Table : {rows} . Read {' '.join(asked)}"
    return question, " ".join(f"{name} {values[name]}" for name in asked)


def running(rng: random.Random, labels: Labels, size: int) -> tuple[str, str]:
    """The running total, modulo 10, of `size` numbers of 0..3."""
    total, digits, totals = 0, [], []
    for label in labels.take(size):
        digit = rng.randint(0, 3)
        total = (total + digit) % 10
        digits.append(f"{label} {digit}")
        totals.append(f"{label} {total}")
    return f"Running total modulo 10 : {' '.join(digits)}", " ".join(totals)


def chain(rng: random.Random, labels: Labels, size: int) -> tuple[str, str]:
    """Follow `size` arrows from one name to another; a few more arrows lead on from there."""
    spare = rng.randint(1, max(2, size // 4))
    nodes = labels.take(size + spare + 1)
    arrows = [f"{a} > {b}" for a, b in itertools.pairwise(nodes)]
    rng.shuffle(arrows)
    path = nodes[: size + 1]
    return f"{' , '.join(arrows)} . Go from {path[0]} to {path[-1]}", " > ".join(path)


MOVES = {"N": (0, 1), "S": (0, -1), "E": (1, 0), "W": (-1, 0)}


def walk(rng: random.Random, labels: Labels, size: int) -> tuple[str, str]:
    """The places visited by `size` unit moves on a torus of 10 by 10."""
    x, y = rng.randint(0, 9), rng.randint(0, 9)
    start, moves, places = f"{x} {y}", [], []
    for label in labels.take(size):
        move = rng.choice("NESW")
        x, y = (x + MOVES[move][0]) % 10, (y + MOVES[move][1]) % 10
        moves.append(f"{label} {move}")
        places.append(f"{label} {x} {y}")
    return f"Walk from {start} : {' '.join(moves)}", " ".join(places)


TASKS: dict[str, Callable[..., tuple[str, str]]] = {
    "word": word,
    "table": table,
    "running": running,
    "chain": chain,
    "walk": walk,
}
# Sizes (events, arrows, digits, numbers, moves) of the problems that count, and of warm-up ones.
FULL = {
    "word": (30, 40),
    "table": (30, 42),
    "running": (36, 48),
    "chain": (32, 44),
    "walk": (32, 42),
}
# How often training draws a task.
WEIGHTS = {"word": 4, "table": 4, "running": 3, "chain": 5, "walk": 5}
SMALL = {"word": (1, 8), "table": (1, 8), "running": (1, 12), "chain": (1, 8), "walk": (1, 9)}


def tokens(text: str) -> int:
    """The number of tokens of a text made here."""
    return len(text.split())


def draw(
    task: str,
    rng: random.Random,
    labels: Labels,
    held_out: bool,
    sizes: dict[str, tuple[int, int]] = FULL,
    entries: int | None = None,
) -> tuple[str, str]:
    """A question and its answer from one half of the split.

    `sizes` bounds the number of steps by task; `entries` is for `table` only.
    """
    while True:
        size = rng.randint(*sizes[task])
        saved = labels.left
        if task == "table":
            wanted = size + rng.randint(1, max(4, size // 3)) if entries is None else entries
            pair = table(rng, labels, size, wanted)
        else:
            pair = TASKS[task](rng, labels, size)
        if is_held_out(pair[0]) == held_out:
            return pair
        labels.left = saved[1:] + saved[:1]


def shots_for(
    task: str, rng: random.Random, labels: Labels, room: int, held_out: bool
) -> tuple[tuple[str, str], ...]:
    """Solved examples that fill about `room` tokens.

    Their labels are none of those taken before; when these run out they are used again.
    """
    spare = tuple(labels.left)
    shots = []
    sizes = {task: (max(SMALL[task][0], 4), (SMALL[task][1] + FULL[task][0]) // 2)}
    while True:
        if len(labels.left) < 2 * sizes[task][1]:
            labels.left = rng.sample(spare, len(spare))
        pair = draw(task, rng, labels, held_out, sizes)
        room -= tokens(pair[0]) + tokens(pair[1]) + TEMPLATE_TOKENS - 1
        if room < 0:
            return tuple(shots)
        shots.append(pair)


def problem(
    task: str, rng: random.Random, prompt_tokens: int | None, held_out: bool, id: str = ""
) -> Problem:
    """One problem, with its prompt filled up to about `prompt_tokens` (templated) if given.

    The filling is solved examples; the table of a long `table` is larger, too.
    """
    labels = Labels(rng)
    if prompt_tokens is None:
        return Problem(id, task, *draw(task, rng, labels, held_out))
    entries = rng.randint(*LONG_TABLE) if task == "table" else None
    pair = draw(task, rng, labels, held_out, FULL, entries)
    room = prompt_tokens - TEMPLATE_TOKENS - tokens(pair[0])
    return Problem(id, task, *pair, shots_for(task, rng, labels, room, held_out))


def problems(
    task: str, seed: int, count: int, prompt_tokens: int | None = None, held_out: bool = True
) -> Iterator[Problem]:
    """`count` problems of one task, the same for the same arguments on every machine."""
    rng = random.Random(f"{task}/{seed}/{prompt_tokens}/{held_out}")
    for index in range(count):
        length = "short" if prompt_tokens is None else "long"
        yield problem(task, rng, prompt_tokens, held_out, f"{task}-{length}-{seed}-{index}")


def conversation(
    rng: random.Random, small: float, packed: float, long: float
) -> tuple[str, list[tuple[str, str]]]:
    """A training conversation: task and turns, every turn with its answer.

    `small` and `packed` are the probabilities of a single warm-up problem and of a packed
    conversation of several problems (or, for `table`, of a table as long); `long` is the
    probability that a packed one is as long as the long prompts.
    """
    task = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    labels = Labels(rng)
    kind = rng.random()
    if kind < small:
        return task, [draw(task, rng, labels, False, SMALL)]
    if kind > 1 - packed:
        length = rng.randint(800, 960) if rng.random() < long else rng.randint(150, 450)
        entries = None
        if task == "table" and length > LONG_TABLE[0] * 4:
            entries = rng.randint(*LONG_TABLE)
        last = draw(task, rng, labels, False, FULL, entries)
        return task, [*shots_for(task, rng, labels, length - tokens(last[0]), False), last]
    return task, [draw(task, rng, labels, False)]


TERSE = (2, 4)  # entries read in a problem for the adapter `terse`
TERSE_SPARE = (1, 4)  # entries of its table that nobody reads


def draw_terse(rng: random.Random, held_out: bool) -> tuple[str, str]:
    """A small `table` and its answer without the names: "91 40 62", not "fig 91 jet 40 pin 62".

    The other tasks have no such form: a name is what the next step finds its place by. For that
    reason the tables are small, too.
    """
    size = rng.randint(*TERSE)
    entries = size + rng.randint(*TERSE_SPARE)
    sizes = {"table": (size, size)}
    question, answer = draw("table", rng, Labels(rng), held_out, sizes, entries)
    return question, " ".join(answer.split()[1::2])


def terse_problems(seed: int, count: int, held_out: bool = True) -> Iterator[Problem]:
    """`count` problems for the adapter, the same for the same arguments on every machine."""
    rng = random.Random(f"terse/{seed}/{held_out}")
    for index in range(count):
        yield Problem(f"terse-{seed}-{index}", "table", *draw_terse(rng, held_out))


def terse_conversation(
    rng: random.Random, small: float, packed: float, long: float
) -> tuple[str, list[tuple[str, str]]]:
    """`conversation` for the adapter: always one problem, so no share counts."""
    return "table", [draw_terse(rng, held_out=False)]
