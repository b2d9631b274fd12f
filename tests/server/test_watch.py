# SPDX-License-Identifier: Apache-2.0
"""A watched answer: its events over HTTP, and on the page that shows them."""

from __future__ import annotations

import functools
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.browser import assert_no_errors, browser, texts, wait_until
from tests.server.conftest import ROOT, Client, questions, user
from vllm_elastic.bench.server import free_port
from vllm_elastic.watch.page_server import PageServer

CANVAS = 64


def watch(client: Client, question: str, **options: Any) -> list[dict[str, Any]]:
    xargs = {"elastic_watch": 1, **options.pop("vllm_xargs", {})}
    body = {"messages": user(question), "max_tokens": CANVAS, "vllm_xargs": xargs}
    body["stream_options"] = {"include_usage": True}
    return client.stream("chat/completions", **body, **options)


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk["choices"]
        if choice["index"] == index
    )


@pytest.mark.parametrize("policy", ["none", "elastic", "elastic-block", "dual-cache"])
def test_events_make_up_the_answer(policy: str, client: Client) -> None:
    """Positions and tokens of the events are the text of the chunks, and of an unwatched answer."""
    (question,) = questions(1)
    xargs = {"elastic_policy": policy}
    chunks = watch(client, question, vllm_xargs=xargs)
    passes = [chunk["elastic"] for chunk in chunks if "elastic" in chunk]
    request = passes[0]["request"]
    assert request["policy"] == policy
    assert request["canvas"] == request["prompt_tokens"] + CANVAS
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == request["prompt_tokens"]
    words: dict[str, str] = {}
    tokens: dict[int, int] = {}
    committed: set[int] = set()
    for made in passes:
        words |= made["words"]
        tokens |= {at: token for at, token, _ in made["canvas"]["predicted"]}
        assert not committed & set(made["committed"]), "once each"
        committed |= set(made["committed"])
    assert [made["denoising_step"] for made in passes] == sorted(
        m["denoising_step"] for m in passes
    )
    first = request["prompt_tokens"]
    answer = range(first, first + usage["completion_tokens"])
    assert committed >= set(answer)
    assert "".join(words[str(tokens[at])].strip() for at in answer) == text_of(chunks).replace(
        " ", ""
    )
    _, plain = client.chat(question, max_tokens=CANVAS, vllm_xargs=xargs)
    assert plain["choices"][0]["message"]["content"] == text_of(chunks)
    assert plain["usage"]["completion_tokens"] == usage["completion_tokens"]


def test_events_come_between_the_chunks(client: Client) -> None:
    """Not when all is over."""
    kinds = ["elastic" in chunk for chunk in watch(client, questions(1)[0])]
    assert kinds[0] and not all(kinds[: sum(kinds)])


def test_copies_are_told_apart(client: Client) -> None:
    chunks = watch(client, questions(1)[0], n=2, temperature=0.7, seed=3)
    passes = [chunk["elastic"] for chunk in chunks if "elastic" in chunk]
    assert {made["index"] for made in passes} == {0, 1}
    assert sum("request" in made for made in passes) == 2


def test_other_answers_have_no_events(client: Client) -> None:
    """Watched or not is the request's; where nobody reads events none are missed."""
    body = {"messages": user(questions(1)[0]), "max_tokens": CANVAS}
    chunks = client.stream("chat/completions", **body)
    assert all("elastic" not in chunk for chunk in chunks)
    status, answer = client.chat(
        questions(1)[0], max_tokens=CANVAS, vllm_xargs={"elastic_watch": 1}
    )
    assert status == 200 and answer["choices"][0]["message"]["content"] == text_of(chunks)


def test_messages_have_no_events(client: Client) -> None:
    """Anthropic's endpoint makes its own events of a chat's chunks: one without text is the end."""

    def events(**options: Any) -> list[dict[str, Any]]:
        body = {"model": "tiny", "messages": user(questions(1)[0]), "max_tokens": CANVAS}
        with client._open("messages", {**body, **options, "stream": True}) as answer:
            lines = [line.decode() for line in answer]
        found = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        return [event for event in found if event["type"] != "content_block_delta"]

    plain, watched = events(), events(vllm_xargs={"elastic_watch": 1})
    assert [event["type"] for event in plain].count("message_delta") == 1
    plain[0]["message"]["id"] = watched[0]["message"]["id"]
    assert watched == plain


def test_figures_do_not_count_events(client: Client) -> None:
    """vLLM would take a pass for the first token."""
    from tests.server_metrics import read_metrics

    name = "vllm:time_to_first_token_seconds_count"
    before = read_metrics(client.server)
    watch(client, questions(1)[0])
    after = read_metrics(client.server)
    assert after[name] - before[name] == 1
    assert after["vllm:generation_tokens_total"] > before["vllm:generation_tokens_total"]


@pytest.fixture(scope="module")
def page(client: Client) -> Iterator[PageServer]:
    with PageServer(("127.0.0.1", 0), client.server.url, questions=questions(2)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def finished(driver: Any) -> bool:
    return bool(
        driver.execute_script("return asking === null && panels.every(panel => panel.complete)")
    )


@pytest.mark.parametrize("order", ["in turn", "at once"])
def test_page_shows_both_answers(order: str, page: PageServer, client: Client) -> None:
    expected = [
        client.chat(questions(1)[0], max_tokens=CANVAS, vllm_xargs={"elastic_preset": preset})[1]
        for preset in ("block", "exact")
    ]
    with browser() as driver:
        driver.get(page.url)
        wait_until(lambda: texts(driver, "#model") == ["tiny"], "the page does not know the model")
        driver.execute_script(
            "byId('canvas').value = arguments[0]; byId('order').value = arguments[1];"
            "byId('pace').value = '0'",
            str(CANVAS),
            order,
        )
        driver.find_element("id", "ask").click()
        wait_until(lambda: finished(driver), "no answer")
        answers = driver.execute_script("return panels.map(panel => panel.text)")
        assert answers == [answer["choices"][0]["message"]["content"] for answer in expected]
        done = [str(answer["usage"]["completion_tokens"]) for answer in expected]
        assert texts(driver, ".figures .done") == done
        assert texts(driver, ".figures .work")[1] == "100%"
        cells = driver.execute_script(
            "return panels.map(p => p.answer.spans.filter(s => s.className.includes(' light') ||"
            " s.className.includes('done')).map(s => s.textContent).join(' '))"
        )
        for shown, answer in zip(cells, answers, strict=True):
            assert shown.split()[: len(answer.split())] == answer.split()
        speeds = [float(text) for text in texts(driver, ".figures .speed")]
        assert all(speed > 0 for speed in speeds)
        driver.find_element("id", "again").click()
        wait_until(lambda: finished(driver), "it is not shown again")
        assert_no_errors(driver)


def test_page_says_what_the_server_refuses(page: PageServer) -> None:
    with browser(390, 844) as driver:
        driver.get(page.url)
        wait_until(lambda: texts(driver, "#model") == ["tiny"], "the page does not know the model")
        assert driver.execute_script("return document.documentElement.scrollWidth") == 390
        knobs = driver.find_elements("css selector", "input.knobs")
        for words, said in (
            ("windw=3", "Did you mean 'elastic_window'?"),
            ("window", "no name=value"),
        ):
            knobs[0].clear()
            knobs[0].send_keys(words)
            driver.find_element("id", "ask").click()
            wait_until(lambda said=said: said in texts(driver, "#problem")[0], said)


@pytest.mark.long
def test_demo_serves_a_page_and_ends_with_its_server() -> None:
    """`make demo-ui`: nothing is left behind by Ctrl-C."""
    port = free_port()
    words = [sys.executable, str(ROOT / "examples" / "demo_ui.py"), "--port", str(port)]
    # A test run in the background ignores Ctrl-C, and so would what it starts.
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, preexec_fn=heeds) as demo:
        assert demo.stdout is not None
        started = [demo.stdout.readline() for _ in range(4)]
        assert f"open http://127.0.0.1:{port}" in started[-1], started
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=60) as answer:
            (model,) = json.load(answer)["data"]
        assert model["id"].endswith("checkpoint")
        demo.send_signal(signal.SIGINT)
        assert demo.wait(60) == 0
    port_of_server = int(started[0].rsplit("--port ", 1)[1])
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://127.0.0.1:{port_of_server}/health", timeout=10)
