# SPDX-License-Identifier: Apache-2.0
"""Adapters behind the server: by the name of a model, loaded at start and while it runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.reliability.fuzz import SERVER_LIMITS
from vllm_elastic.bench.server import ServerProcess

from .conftest import KV_CACHE_BYTES, MODEL, ROOT, Client, user
from .test_documented_requests import CURLS, WITH_ADAPTERS

pytestmark = pytest.mark.slow  # a server of its own

TERSE = MODEL.parent / "terse"
QUESTION = "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
IN_FULL, BY_VALUES = "fig 91 jet 40 pin 62", "91 40 62"


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    options = ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--served-model-name", "tiny"]
    options += ["--max-model-len", "512", "--enable-lora", "--lora-modules", f"terse={TERSE}"]
    log = tmp_path_factory.mktemp("adapters") / "server.log"
    env = {**SERVER_LIMITS, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    with ServerProcess(MODEL, options, log=log, env=env) as server:
        yield Client(server)


def answer(client: Client, model: str) -> str:
    status, found = client.chat(QUESTION, model=model, max_tokens=64)
    assert (status, found["model"]) == (200, model), found
    return str(found["choices"][0]["message"]["content"]).strip()


def change(client: Client, path: str, **body: str) -> tuple[int, str]:
    """Load or unload; both answer in plain text where they succeed."""
    request = urllib.request.Request(
        f"{client.server.url}/v1/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as found:
            return found.status, found.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_at_once_each_as_its_model_answers(adapted: Client) -> None:
    with urllib.request.urlopen(f"{adapted.server.url}/v1/models") as found:
        assert [model["id"] for model in json.load(found)["data"]] == ["tiny", "terse"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda model: answer(adapted, model), ["tiny", "terse"] * 8))
    assert answers == [IN_FULL, BY_VALUES] * 8


def test_documented_request(adapted: Client) -> None:
    """docs/adapters.md's."""
    words = [
        word.replace("localhost:8000", f"127.0.0.1:{adapted.server.port}")
        for word in dict(CURLS)[WITH_ADAPTERS]
    ]
    ran = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ran.stdout)["choices"][0]["message"]["content"].strip() == BY_VALUES
    assert f"answers `{BY_VALUES}`" in (ROOT / WITH_ADAPTERS).read_text()


def test_streamed(adapted: Client) -> None:
    body = {"model": "terse", "messages": user(QUESTION), "max_tokens": 64}
    events = adapted.stream("chat/completions", **body)
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events)
    assert text.strip() == BY_VALUES
    assert {event["model"] for event in events} == {"terse"}


def test_loaded_and_unloaded_while_it_runs(adapted: Client, tmp_path: Path) -> None:
    """What cannot be loaded is said, and the server goes on."""
    path = tmp_path / "terse"
    shutil.copytree(TERSE, path)
    assert change(adapted, "load_lora_adapter", lora_name="again", lora_path=str(path))[0] == 200
    assert answer(adapted, "again") == BY_VALUES
    assert change(adapted, "unload_lora_adapter", lora_name="again")[0] == 200
    assert adapted.chat(QUESTION, model="again")[0] == 404
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"r": 64}))
    for where, message in {
        str(path): "LoRA rank 64 is greater than max_lora_rank 16",
        str(tmp_path / "nowhere"): "No adapter found for",
    }.items():
        status, said = change(adapted, "load_lora_adapter", lora_name="bad", lora_path=where)
        assert status >= 400 and message in said
    assert (answer(adapted, "tiny"), answer(adapted, "terse")) == (IN_FULL, BY_VALUES)


def test_one_whose_files_are_gone_ends_its_requests_alone(adapted: Client, tmp_path: Path) -> None:
    """Loading another one made room, and its own cannot be read again."""
    path = tmp_path / "terse"
    shutil.copytree(TERSE, path)
    assert change(adapted, "load_lora_adapter", lora_name="gone", lora_path=str(path))[0] == 200
    assert answer(adapted, "terse") == BY_VALUES  # there is one slot
    shutil.rmtree(path)
    status, said = adapted.chat(QUESTION, model="gone")
    assert status == 500, said
    assert (answer(adapted, "tiny"), answer(adapted, "terse")) == (IN_FULL, BY_VALUES)
    log = adapted.server.log.read_text()
    assert "No adapter found for" in log and "is ended with an error" in log
