# SPDX-License-Identifier: Apache-2.0
"""Good requests of every kind, each with one right answer, and what load of them comes back as."""

from __future__ import annotations

import difflib
import json
import random
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.exchange import Answer, Ask, Choice, exchange

CANVASES = (1, 7, 16, 33, 64, 96, 128)
STEPS_CANVAS = 32

KNOBS: tuple[dict[str, Any], ...] = (
    {},
    {"elastic_policy": "none"},
    {"elastic_policy": "none", "elastic_tokens_per_step": 3},
    {"elastic_policy": "dual-cache", "elastic_block_length": 8},
    {"elastic_policy": "dual-cache", "elastic_block_length": 32, "elastic_threshold": 0.5},
    {"elastic_policy": "elastic", "elastic_gamma": 0},
    {"elastic_policy": "elastic", "elastic_gamma": 0.95, "elastic_window": 5},
    {"elastic_preset": "published", "elastic_gamma": 1.1, "elastic_threshold": 0.6},
    {"elastic_preset": "paper", "elastic_tokens_per_step": 2},
    {"elastic_policy": "elastic", "elastic_track_num": 4, "elastic_gamma": 0.8},
    {"elastic_policy": "elastic", "elastic_refresh": "next", "elastic_gamma": 0.95},
    {"elastic_policy": "interval", "elastic_interval": 3},
    {"elastic_policy": "elastic-block", "elastic_block_drift": 0.01},
    {"elastic_steps": 16, "elastic_block_length": 8},
    {"elastic_steps": 8, "elastic_block_length": 16, "elastic_remasking": "random"},
)
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"ignore_eos": True},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 1.0, "n": 2},
    {"min_tokens": 5, "stop": ["3"]},
    {"logit_bias": {"7": -100, "9": 3.5}},
)


def mixed_asks(count: int, model: Path, seed: int = 0) -> list[Ask]:
    """Distinct requests that every LLaDA of at least 512 positions can serve, unstreamed.

    Policies, knobs, lengths, sampling, chats, completions and infilling are drawn independently.
    Every one has a seed, so that its answer is the same each time.

    Args:
        model: directory with the model's config.json.
    """
    config = json.loads((model / "config.json").read_text())
    return [_ask(random.Random(seed * 1_000_003 + i), config) for i in range(count)]


def _ask(rng: random.Random, config: Mapping[str, Any]) -> Ask:
    numbers = " ".join(str(rng.randrange(10)) for _ in range(rng.choice((2, 9, 30, 80))))
    prompt = f"{rng.choice(('Sort', 'Sum', 'Repeat'))} : {numbers}"
    knobs = dict(rng.choice(KNOBS))
    body: dict[str, Any] = {
        "max_tokens": STEPS_CANVAS if "elastic_steps" in knobs else rng.choice(CANVASES),
        "seed": rng.randrange(1 << 40),
        "return_token_ids": True,
        **rng.choice(SAMPLING),
    }
    body["min_tokens"] = min(body.get("min_tokens", 0), body["max_tokens"])
    if "elastic_steps" not in knobs and rng.random() < 0.1:
        knobs["elastic_canvas"] = _infilling(rng, config, body["max_tokens"])
    if knobs:
        body["vllm_xargs"] = knobs
    if rng.random() < 0.5:
        return Ask("/v1/completions", {"prompt": prompt, "logprobs": 2, **body})
    return Ask("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **body})


def _infilling(rng: random.Random, config: Mapping[str, Any], length: int) -> list[int]:
    mask: int = config["mask_token_id"]
    special = {config.get("eos_token_id"), config.get("pad_token_id")}
    words = [t for t in range(min(config["vocab_size"], 300)) if t not in special]
    return [mask, *(rng.choice(words) if rng.random() < 0.3 else mask for _ in range(length - 1))]


@dataclass
class Tally:
    """What came back under load, held against the same requests asked alone.

    Attributes:
        requests: answered to the end or left by us; streamed and left are of these.
        failures: requests without an answer or with a status other than 200.
        wrong: answers that differ in tokens, text or finish reason.
        lost: tokens of the right answers that are missing; added: tokens that are too many.
        tokens: tokens received.
        examples: the first few of what went wrong.
    """

    requests: int = 0
    streamed: int = 0
    left: int = 0
    failures: int = 0
    wrong: int = 0
    lost: int = 0
    added: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_clean(self) -> bool:
        """Every answer came and was the right one."""
        return not (self.failures or self.wrong or self.lost or self.added)

    def count(self, ask: Ask, answer: Answer, right: Answer) -> None:
        """Take in one answer; from any thread."""
        with self._lock:
            self.requests += 1
            self.streamed += bool(ask.body.get("stream"))
            self.left += answer.left
            if answer.status != 200:
                self.failures += 1
                self._example(f"status {answer.status}: {answer.error}", ask)
                return
            difference = _difference(answer, right)
            self.tokens += sum(len(choice.token_ids) for choice in answer.choices.values())
            self.lost += difference[0]
            self.added += difference[1]
            if any(difference):
                self.wrong += 1
                self._example(f"{answer.choices} instead of {right.choices}", ask)

    def _example(self, what: str, ask: Ask) -> None:
        if len(self.examples) < 5:
            self.examples.append(f"{what}\n  {ask.path} {json.dumps(ask.body)}")


def _difference(answer: Answer, right: Answer) -> tuple[int, int, bool]:
    """Tokens lost, tokens added, and whether anything else differs."""
    lost = added = 0
    other = False
    for index, wanted in right.choices.items():
        choice = answer.choices.get(index, Choice())
        token_ids = wanted.token_ids
        if answer.left:  # what came must be a beginning
            token_ids = token_ids[: len(choice.token_ids)]
            other |= not wanted.text.startswith(choice.text)
        else:
            other |= (choice.text, choice.finish_reason) != (wanted.text, wanted.finish_reason)
        if choice.token_ids != token_ids:
            matcher = difflib.SequenceMatcher(None, token_ids, choice.token_ids, autojunk=False)
            common = sum(block.size for block in matcher.get_matching_blocks())
            lost += len(token_ids) - common
            added += len(choice.token_ids) - common
            other = True
    return lost, added, other


class Load:
    """Clients that ask good requests over and over, until stopped; a context manager.

    Leaving it waits for the answers that are due. Each client asks a random request, whole or
    streamed, and hangs up on some streams at a random moment.

    Args:
        clients: requests that are in flight at any time.
        leave_share: share of the requests that are left in the middle.
    """

    def __init__(
        self,
        address: tuple[str, int],
        asks: Sequence[Ask],
        right: Sequence[Answer],
        *,
        clients: int,
        leave_share: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.tally = Tally()
        self._address = address
        self._cases = list(zip(asks, right, strict=True))
        self._leave_share = leave_share
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._client, args=(random.Random(seed + i),), daemon=True)
            for i in range(clients)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self, rng: random.Random) -> None:
        while not self._stop.is_set():
            ask, right = rng.choice(self._cases)
            if rng.random() < self._leave_share:
                ask = ask.streamed(leave_after=rng.randint(1, 3))
            elif rng.random() < 0.5:
                ask = ask.streamed()
            answer = exchange(self._address, ask)
            self.tally.count(ask, answer, right)
            if answer.status == 0:
                self._stop.wait(1.0)  # a server that is gone must not be asked in a tight loop


def ask_alone(address: tuple[str, int], asks: Sequence[Ask]) -> list[Answer]:
    """The right answers: every request asked whole, with nothing else running.

    Raises:
        RuntimeError: a request fails; with the request and the server's message.
    """
    answers = []
    for ask in asks:
        answer = exchange(address, ask)
        if answer.status != 200:
            raise RuntimeError(
                f"status {answer.status}: {answer.error}\n{ask.path} {json.dumps(ask.body)}"
            )
        answers.append(answer)
    return answers


def ask_again(
    address: tuple[str, int], asks: Sequence[Ask], right: Sequence[Answer], clients: int = 1
) -> Tally:
    """Ask every request once more, whole, ``clients`` at a time."""
    tally = Tally()
    with ThreadPoolExecutor(clients) as pool:
        for ask, answer, wanted in zip(
            asks, pool.map(lambda ask: exchange(address, ask), asks), right, strict=True
        ):
            tally.count(ask, answer, wanted)
    return tally
