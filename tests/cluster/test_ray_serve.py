# SPDX-License-Identifier: Apache-2.0
"""``examples/ray_serve``: two replicas behind one endpoint, and one of them dies."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.server.conftest import MODEL, ROOT, questions, user
from tests.server.test_worker_death import LONG
from vllm_elastic.bench.server import free_port

from .ray_node import inherited, one_node, program
from .serving import CANVAS, LIMIT, LIMITS, assert_equals_oracle

REPLICAS = 2
REPLACED_WITHIN = 300.0


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """Of a deployment on a Ray of this test's own, as the example's README starts it."""
    # Here, since this file is read for every run of pytest, and Ray takes seconds to import.
    pytest.importorskip(
        "ray.serve", reason="no Ray Serve here: install the extra `serve`", exc_type=ImportError
    )
    port = free_port()
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    with one_node(cpus=REPLICAS + 1, **binding) as cluster:
        address = ["--address", cluster.env["RAY_ADDRESS"]]
        listen = ["--http-host", "127.0.0.1", "--http-port", str(port)]
        run(["start", *address, *listen, "--proxy-location", "HeadOnly"], cluster.env)
        arguments = [f"model={MODEL}", f"replicas={REPLICAS}", f"options={shlex.join(LIMITS)}"]
        run(["run", "--non-blocking", *address, "app:app", *arguments], cluster.env)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
            yield client


def run(arguments: list[str], env: dict[str, str]) -> None:
    done = subprocess.run(
        [program("serve"), *arguments],
        cwd=ROOT / "examples" / "ray_serve",
        env=inherited() | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


class Streamed:
    """A long streamed answer that has begun."""

    def __init__(self, client: openai.OpenAI) -> None:
        options = {key: value for key, value in LONG.items() if key != "max_tokens"}
        self.raw = client.chat.completions.with_raw_response.create(
            model="tiny",
            stream=True,
            max_tokens=LONG["max_tokens"],
            messages=options.pop("messages"),
            extra_body=options,
        )
        self.replica = self.raw.headers["x-replica"]
        self.chunks = iter(self.raw.parse())
        self.finish: str | None = None

    def read(self) -> Exception | None:
        """To its end, or to the error that ends it."""
        try:
            for chunk in self.chunks:
                self.finish = chunk.choices[0].finish_reason or self.finish
        except Exception as error:
            return error
        return None


def answer(client: openai.OpenAI, question: str) -> str:
    """Ask, compare with the oracle, and say which replica it was."""
    raw = client.chat.completions.with_raw_response.create(
        model="tiny",
        messages=user(question),
        max_tokens=CANVAS,
        extra_body={"return_token_ids": True},
    )
    found: Any = raw.parse()
    assert_equals_oracle(found.prompt_token_ids, found.choices[0].token_ids)
    return str(raw.headers["x-replica"])


def test_two_replicas_answer_as_the_oracle(client: openai.OpenAI, row: Callable[..., None]) -> None:
    asked = questions(12)
    with ThreadPoolExecutor(4) as pool:
        replicas = list(pool.map(lambda question: answer(client, question), asked))
    assert len(set(replicas)) == REPLICAS
    row(
        executor="ray serve",
        nodes=1,
        requests=len(asked),
        equal=len(replicas),
        note=f"replicas answered {' and '.join(str(replicas.count(r)) for r in set(replicas))}",
    )


def test_streamed_as_not_streamed(client: openai.OpenAI, row: Callable[..., None]) -> None:
    messages: Any = user(questions(1)[0])
    options: Any = {"model": "tiny", "messages": messages, "max_tokens": CANVAS}
    whole = client.chat.completions.create(**options).choices[0].message.content
    chunks = list(client.chat.completions.create(stream=True, **options))
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert whole and "".join(parts) == whole
    assert chunks[-1].choices[0].finish_reason
    row(executor="ray serve", nodes=1, requests=2, note=f"{sum(map(bool, parts))} pieces of text")


def test_the_other_replica_goes_on(client: openai.OpenAI, row: Callable[..., None]) -> None:
    """The engine of a replica dies under load: its clients are told, others notice nothing."""
    streams = [Streamed(client)]
    while len({stream.replica for stream in streams}) < REPLICAS:
        assert len(streams) < 20, "all on one replica"
        streams.append(Streamed(client))
    victim = streams[0].replica
    _, _, pid = victim.rpartition(":")
    children = psutil.Process(int(pid)).children(recursive=True)
    (worker,) = [child for child in children if child.name() == "VLLM::Worker"]
    with ThreadPoolExecutor(len(streams)) as pool:
        reading = [pool.submit(stream.read) for stream in streams]
        started = time.monotonic()
        worker.kill()
        for stream, future in zip(streams, reading, strict=True):
            if stream.replica == victim:
                assert isinstance(future.result(LIMIT), (openai.APIError, httpx.TransportError))
        told = time.monotonic() - started
        # The client of OpenAI asks again by itself, twice, if it meets the replica that is going.
        retried = answer(client, questions(1)[0])
        assert retried != victim
        for stream, future in zip(streams, reading, strict=True):
            if stream.replica != victim:
                assert future.result(300) is None
                assert stream.finish == "length"
    known = {stream.replica for stream in streams}
    while answer(client, questions(1)[0]) in known:
        assert time.monotonic() - started < REPLACED_WITHIN, "no new replica"
        time.sleep(0.5)
    replaced = time.monotonic() - started
    assert not worker.is_running() and not psutil.pid_exists(int(pid))
    row(
        executor="ray serve",
        nodes=1,
        requests=len(streams),
        told=told,
        note=f"a new replica answered after {replaced:.0f} s",
    )
