# SPDX-License-Identifier: Apache-2.0
"""What goes between host and device in a pass, counted on a CPU by the operators that do it.

Every transfer to a device starts with a tensor made of host data (``lift_fresh``), every one back
ends in an array (``numpy()``). Where host and device are one, nothing is copied, but both are made.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.models.rows import bucket
from vllm_elastic.runner import head
from vllm_elastic.runner.batch import PassLayout
from vllm_elastic.runner.download import Download

from .conftest import Served
from .driver import Driver, prompt_of
from .test_oracle import request

pytestmark = pytest.mark.engine


class Operators(TorchDispatchMode):
    """Counts operators by name; ``waits`` are those for whose result the host waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name in WAITING or (name in INDEXING and any(map(_is_mask, args[1]))):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
"""By a mask these look for its places first: how many there are is the result's shape."""

POLICIES = {
    "none": ["none"],
    "dual-cache": ["dual-cache"],
    "interval": ["interval"],
    "elastic": ["released-high", "paper-low", "next-low"],
    "elastic-block": ["block", "block-fine", "block-replay"],
}


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_upload_and_one_download_a_pass(
    policy: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would be sent a dozen small pageable copies a pass, five for each plan that tests, and
    would be waited for where one number decides what comes next."""
    served, names = serve("gqa-tied"), POLICIES[policy]
    requests = [request(index, names[index % len(names)]) for index in range(16)]
    with counted_transfers(served, len(requests), monkeypatch):
        served.engine.run(requests)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "policy", [pytest.param("elastic", marks=pytest.mark.slow), "elastic-block"]
)
def test_as_few_transfers_with_kernels(
    policy: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Triton's interpreter; on a GPU it is what the test above counts."""
    pytest.importorskip("triton")
    from tests import triton_interpreter  # noqa: F401
    from vllm_elastic.runner.statistics import attention_sums
    from vllm_elastic.runner.statistics.kernel_sums import KernelSums

    monkeypatch.setattr(attention_sums, "TorchSums", KernelSums)
    served, names = serve("gqa-tied"), POLICIES[policy]
    with counted_transfers(served, 2, monkeypatch):
        requests = [request(index, names[index]) for index in range(2)]
        served.engine.run(requests)  # type: ignore[attr-defined]


WISHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sampled": (dict(temperature=0.8, top_k=9, top_p=0.9, min_p=0.01, seed=3), {}),
    "logit_bias": (dict(logit_bias={5: 3.0, 7: -2.0}), {}),
    "allowed_token_ids": (dict(allowed_token_ids=[3, 5, 9, 20, 70]), {}),
    "bad_words_ids": ({}, dict(logits_eos_inf=True)),
    "min_tokens": (dict(min_tokens=9), {}),
    "unconfident": ({}, dict(confidence_eos_eot_inf=True)),
    "logprobs": (dict(logprobs=3), {}),
    "its own logprob": (dict(logprobs=0, temperature=0.5), {}),
    "entropies": ({}, dict(commit="entropy")),
    "alg": ({}, dict(alg="topk_margin")),
    "alg, sampled": (dict(temperature=0.8), dict(alg="entropy")),
}
"""Sampling parameters and knobs."""

PLAIN = Sampling()


@pytest.mark.parametrize("rows_at_once", [10_000, 20], ids=["all", "in parts"])
def test_what_requests_wish_goes_along(
    rows_at_once: int, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each list of token ids would be a pageable copy for itself, each log probability a wait."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 293 * rows_at_once)
    served = serve("gqa-tied")
    driver = Driver(served)
    wished: set[str] = set()

    def note(plans: Any) -> None:
        for sampling in (plan.sampling for plan in plans if plan.sampling is not None):
            wished.update(
                field.name
                for field in fields(Sampling)
                if getattr(sampling, field.name) != getattr(PLAIN, field.name)
            )

    for index, (sampling, knobs) in enumerate(WISHES.values()):
        driver.add(prompt_of(20 + index, index), 24, sampling, **knobs)
    with counted_transfers(served, len(WISHES), monkeypatch, note):
        driver.run()
    driver.take_records()
    assert wished == {field.name for field in fields(Sampling)}


def noted(name: str, counts: Counter[str]) -> Callable[..., Any]:
    """A tensor's method that brings it to the host, counted."""
    method = getattr(torch.Tensor, name)

    def called(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return method(tensor, *args, **kwargs)

    return called


@contextlib.contextmanager
def counted_transfers(
    served: Served,
    num_requests: int,
    monkeypatch: pytest.MonkeyPatch,
    look: Callable[[Any], None] = lambda plans: None,
) -> Iterator[None]:
    """What is run goes there and back once a pass; at some time so many requests share one.

    Args:
        look: is shown the plans of each pass.
    """
    engine: Any = served.engine
    start, download = engine.runner.start, Download.send
    call, metadata = PassLayout._call, PassLayout._metadata
    num_plans: list[int] = []
    counts: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def counted(plans: Any) -> Any:
        counts.clear()
        calls.clear()
        with Operators() as seen:
            in_flight = start(plans)
        num_plans.append(len(plans))
        look(plans)
        # vLLM's attention metadata has two tensors for the host itself.
        assert seen.counts["lift_fresh"] == 2 * calls["laid out"]
        assert 0 < calls["built"] <= calls["laid out"]
        assert not seen.waits
        assert counts == {"downloads": 1}
        return in_flight

    def noted_call(*args: Any) -> Any:
        calls["laid out"] += 1
        return call(*args)

    def noted_metadata(*args: Any) -> Any:
        calls["built"] += 1
        before = counts.copy()
        built = metadata(*args)
        counts.clear()  # vLLM's metadata builder reads its own host tensors
        counts.update(before)
        return built

    def fetched(own: Download) -> None:
        counts["downloads"] += 1
        download(own)

    for name in ("numpy", "tolist", "item", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, noted(name, counts), raising=False)
    monkeypatch.setattr(PassLayout, "_call", noted_call)
    monkeypatch.setattr(PassLayout, "_metadata", noted_metadata)
    monkeypatch.setattr(Download, "send", fetched)
    monkeypatch.setattr(engine.runner, "start", counted)
    yield
    assert max(num_plans) == num_requests


def test_nothing_is_waited_for_before_a_pass_is_queued(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next pass would not be queued while the device works on this one."""
    served = serve("gqa-tied")
    driver = Driver(served)
    wishes: list[dict[str, Any]] = [
        {},
        {"logprobs": 3},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 9, "min_p": 0.1, "seed": 2, "logprobs": 0},
    ]
    asks = list(itertools.product(wishes, POLICIES))
    for nth, (wish, policy) in enumerate(asks):
        driver.add(prompt_of(20 + nth, nth), 20, wish, policy=policy, block_length=4)
    with counted_transfers(served, len(asks), monkeypatch):
        driver.run()
    assert max(record.passes for record in driver.take_records().values()) > 5


BUDGET = {
    "none": {"first": 256, "full": 254},
    "dual-cache": {"first": 256, "window": 254, "full": 254},
    "elastic-block": {"first": 328, "window": 254, "refresh": 270, "measuring window": 351},
}
"""Operators of a pass of one request in a model of 5 layers, its head and statistics included. Keys
of blocks that are not neighbours take ten more to read."""


def kind_of(plan: Any) -> str:
    """A first pass measures in any case."""
    measures = plan.measure is not None and plan.kind != "first"
    return f"measuring {plan.kind}" if measures else plan.kind


@pytest.mark.parametrize("policy", BUDGET)
def test_operators_of_a_pass(
    policy: str, serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU each is a launch, on a small model their overhead is the time: a change that adds
    some has to say so here."""
    driver = Driver(serve("gqa-tied"))
    knobs: Any = {"policy": policy, "window": 16, "block_length": 16, "granularity": 8}
    # What the upload's buffer has to grow for it has grown for then.
    driver.add(prompt_of(45, 3), 64, **knobs)
    driver.run()
    run = driver.engine.runner.run
    most: Counter[str] = Counter()

    def counted(plans: Any) -> Any:
        with Operators() as seen:
            results = run(plans)
        kind = kind_of(plans[0])
        most[kind] = max(most[kind], seen.counts.total())
        return results

    monkeypatch.setattr(driver.engine.runner, "run", counted)
    driver.add(prompt_of(45, 3), 64, **knobs)
    driver.run()
    driver.take_records()
    assert most.keys() == BUDGET[policy].keys()
    for kind, count in most.items():
        assert count <= BUDGET[policy][kind], most


PRODUCTS = {"onednn_mm", "linear", "mm", "addmm"}


def test_products_have_few_shapes(
    serve: Callable[[str], Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN compiles one, and keeps it, for each number of rows: the head's had any."""
    driver = Driver(serve("gqa-tied"))
    start = driver.engine.runner.start
    met: set[int] = set()
    windows: set[int] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket.__name__ in PRODUCTS:
                met.add(args[0].shape[0])
            return func(*args, **(kwargs or {}))

    def noted_start(plans: Any) -> Any:
        windows.add(sum(len(plan.window) for plan in plans))
        with Products():
            return start(plans)

    monkeypatch.setattr(driver.engine.runner, "start", noted_start)
    for nth in range(5):
        driver.add(prompt_of(20 + nth, nth), 20 + nth, policy=list(POLICIES)[nth % len(POLICIES)])
    driver.run()
    driver.take_records()
    assert any(count != bucket(count) for count in windows)
    assert met and {bucket(count) for count in met} == met
