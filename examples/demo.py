# SPDX-License-Identifier: Apache-2.0
"""`make demo`: a real `vllm serve` streams three answers; then what each setting computes for them.

python examples/demo.py [--model DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tiny_llada"))

from tasks import problems  # noqa: E402

from vllm_elastic.bench.server import ServerProcess  # noqa: E402

TINY_LLADA = HERE / "tiny_llada" / "checkpoint"
TASKS = ("word", "table", "chain")
SEED = 7  # of the held-out suite: the model was not trained on these questions
CANVAS = 256
KV_CACHE_BYTES = 256 << 20
SETTINGS: dict[str, dict[str, Any]] = {
    "block (default)": {"preset": "block"},
    "dual-cache": {"policy": "dual-cache"},
    "published": {"preset": "published"},
    "exact": {"preset": "exact"},
}
BASELINE = "exact"
ROUNDS = 3
WIDTH = min(shutil.get_terminal_size().columns, 100)


def show(pieces: Iterable[str]) -> str:
    """Print text as it arrives, broken at word ends; returns all of it."""
    text, column, word = "", 2, ""
    print("  ", end="", flush=True)
    for piece in itertools.chain(pieces, ["\n"]):  # the line end shows the last word
        text += piece
        for char in piece:
            if not char.isspace():
                word += char
                continue
            if column + len(word) + 1 > WIDTH:
                print("\n  ", end="")
                column = 2
            if word:
                print(word, end=" ")
                column += len(word) + 1
            word = ""
        sys.stdout.flush()
    print()
    return text


@dataclass
class Asked:
    """A problem as the demo asks it.

    Attributes:
        title: of its part of the output.
        question: as shown; answer: the right one.
        messages: of the chat; request: the same for ``BenchEngine.run``, given the tokenizer.
        check: whether a text is the answer.
        introduce: prints what else there is to see.
    """

    title: str
    question: str
    answer: str
    messages: list[dict[str, Any]]
    request: Callable[[Any], dict[str, Any]]
    check: Callable[[str], bool]
    introduce: Callable[[], None] = lambda: None


def ask(client: Any, model: str, asked: Asked, canvas: int) -> Iterator[str]:
    """The answer's pieces, as the server streams them."""
    stream = client.chat.completions.create(
        model=model, messages=asked.messages, max_tokens=canvas, stream=True
    )
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


def stream_answers(server: ServerProcess, chosen: list[Asked], canvas: int) -> None:
    """Ask the running server all problems, one after the other."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    model = client.models.list().data[0].id
    for number, asked in enumerate(chosen, start=1):
        print(f"\n--- {number} of {len(chosen)}: {asked.title} ".ljust(WIDTH, "-"))
        asked.introduce()
        show([asked.question])
        print("\n  answer, as it arrives:\n")
        began = time.perf_counter()
        answer = show(ask(client, model, asked, canvas))
        seconds = time.perf_counter() - began
        if asked.check(answer):
            print(f"\n  correct ({seconds:.1f} s)")
        else:
            print(f"\n  WRONG ({seconds:.1f} s); it should be\n")
            show([asked.answer])


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send what this process and its libraries print, C++ included, to a file."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        for copy, fd in zip(saved, (1, 2), strict=True):
            os.dup2(copy, fd)
            os.close(copy)


def measure(model: str, chosen: list[Asked], canvas: int) -> dict[str, dict[str, float]]:
    """Decode the problems in this process with each setting; they take turns in each round."""
    from vllm_elastic.bench.engine import BenchEngine

    engine = BenchEngine(
        model,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        batch_size=1,
    )
    tokenizer = engine.llm.get_tokenizer()
    prompts = [asked.request(tokenizer) for asked in chosen]
    engine.run([prompts[0] | {"max_tokens": 16}])  # warm up
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    results: dict[str, list[dict[str, Any]]] = {}
    for _ in range(ROUNDS):
        for name, knobs in SETTINGS.items():
            own = {f"elastic_{knob}": value for knob, value in knobs.items()}
            requests = [prompt | {"max_tokens": canvas, **own} for prompt in prompts]
            began = time.perf_counter()
            results[name] = engine.run(requests)
            seconds[name].append(time.perf_counter() - began)
    rows = {}
    for name, answers in results.items():
        tokens = sum(len(answer["token_ids"]) for answer in answers)
        rows[name] = {
            "correct": sum(p.check(a["text"]) for p, a in zip(chosen, answers, strict=True)),
            "tokens": tokens,
            "passes": sum(answer["passes"] for answer in answers),
            "work": sum(answer["row_layers"] for answer in answers) / max(tokens, 1),
            "speed": tokens / statistics.median(seconds[name]),
        }
    return rows


def print_table(rows: dict[str, dict[str, float]], count: int) -> None:
    """One line a setting."""
    print(f"{'row-layers per token,':>{2 + 17 + 9 + 8 + 8 + 24}}")
    print(
        f"  {'setting':17}{'correct':>9}{'tokens':>8}{'passes':>8}"
        f"{f'relative to {BASELINE}':>24}{'tokens/s':>10}"
    )
    for name, row in rows.items():
        correct, work = f"{row['correct']:.0f}/{count}", row["work"] / (rows[BASELINE]["work"] or 1)
        print(
            f"  {name:17}{correct:>9}{row['tokens']:>8.0f}{row['passes']:>8.0f}"
            f"{work:>24.3f}{row['speed']:>10.1f}"
        )


def text_problems() -> list[Asked]:
    """Three problems of the tiny LLaDA's held-out suite."""

    def asked(problem: Any) -> Asked:
        messages = problem.messages()

        def request(tokenizer: Any) -> dict[str, Any]:
            template = tokenizer.apply_chat_template
            return {"prompt": template(messages, tokenize=False, add_generation_prompt=True)}

        return Asked(
            problem.task, problem.question, problem.answer, messages, request, problem.check
        )

    return [asked(problem) for task in TASKS for problem in problems(task, SEED, 1)]


def demonstrate(description: str, model: Path, chosen: list[Asked], canvas: int) -> None:
    """Serve, stream, compare."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default=os.path.relpath(model))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    log = Path(tempfile.mkdtemp(prefix="elastic-demo-")) / "server.log"
    options = ["--dtype", "float32", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    server = ServerProcess(args.model, options, log=log)
    print(f"$ {server.command_line}")
    print(f"  log: {log}\n  starting ...", end="", flush=True)
    began = time.perf_counter()
    try:
        with server:
            print(f" answers after {time.perf_counter() - began:.0f} s")
            stream_answers(server, chosen, canvas)
    except RuntimeError as error:
        sys.exit(f"\n{error}")
    print(f"\n{'':-<{WIDTH}}")
    print(
        "\nThe server is stopped. What each setting computes for the same problems: decoded\n"
        "again in this process, because HTTP does not return passes and row-layers. One request\n"
        f"at a time; settings take turns; tokens/s is the median of {ROUNDS} rounds."
        f"\n\n  log: {log.with_name('engine.log')}\n  measuring ...\n",
        flush=True,
    )
    with output_to(log.with_name("engine.log")):
        rows = measure(args.model, chosen, canvas)
    print_table(rows, len(chosen))
    print(
        "\nA row-layer is one position computed in one layer. `block` is what the command above\n"
        "runs. `exact` has no cache: all positions in all layers at every step. `dual-cache`\n"
        "refreshes on a fixed schedule (Fast-dLLM). `published` is Elastic-Cache as released."
    )


if __name__ == "__main__":
    demonstrate(__doc__.splitlines()[0], TINY_LLADA, text_problems(), CANVAS)
