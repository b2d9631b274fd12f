# SPDX-License-Identifier: Apache-2.0
"""Two ranks against the oracle, and what they send each other. float32."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import write_adapter
from tests.device import NUM_CARDS, ON_CARD
from tests.engines_kept import end_ranks
from tests.qwen2_oracle import Qwen2Oracle, small_config
from vllm_elastic.reference import LLaDA

from .adapted import everything, weights_of, with_weights
from .agreement import agrees
from .asynchronous import on_cpus
from .collectives import count_collectives, expected_traffic, take_collectives
from .conftest import EOS, MASK, ORACLES_DEFAULTS, RANDOM_MODELS, Served, random_config
from .random_families import FAMILIES, save_family
from .test_oracle import CONFIGS, ask_oracle

RANKS = 2

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(600),
    pytest.mark.skipif(ON_CARD and NUM_CARDS < RANKS, reason="a card for each of two ranks"),
]

ROW_BUDGET = 24  # less than a canvas of the problems below
DREAM = small_config(hidden_size=128, num_attention_heads=4)
MODELS: dict[str, Callable[[], LLaDA]] = {
    "gqa-tied": lambda: LLaDA.random(random_config(**RANDOM_MODELS["gqa-tied"]), seed=3),
    # Heads, KV heads and their biases are shared out.
    "dream": lambda: Qwen2Oracle(DREAM, seed=3),
    # One KV head, which both ranks keep; an odd number of layers of hidden states.
    "dream-mqa": lambda: Qwen2Oracle(DREAM | {"num_key_value_heads": 1, "vocab_size": 320}, seed=6),
}


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[LLaDA, Path]]:
    def save(name: str) -> tuple[LLaDA, Path]:
        directory = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        oracle = MODELS[name]()
        oracle.save_pretrained(directory)
        return oracle, directory

    return save


def start(
    oracle: LLaDA,
    directory: Path,
    name: str,
    backend: str,
    elastic_config: dict[str, Any] | None = None,
    **options: Any,
) -> Served:
    """The scheduler in this process, where its records are; the ranks in theirs."""
    from vllm_elastic.bench.engine import BenchEngine

    engine = BenchEngine(
        directory,
        batch_size=8,
        max_model_len=128,
        kv_cache_memory_bytes=16 << 20,
        similarities=True,
        tensor_parallel_size=RANKS,
        distributed_executor_backend=backend,
        elastic_config={**ORACLES_DEFAULTS, **(elastic_config or {})},
        **options,
    )
    return Served(name, directory, oracle, engine)


@pytest.fixture(scope="module")
def served(directory_of: Callable[[str], tuple[LLaDA, Path]]) -> Iterator[Served]:
    served = start(*directory_of("gqa-tied"), "gqa-tied", "mp")
    yield served
    end_ranks(served.engine)


def workers(served: Served, function: Callable[..., Any]) -> list[Any]:
    """``function(worker)`` in every rank."""
    return served.engine.llm.collective_rpc(function)  # type: ignore[attr-defined]


def problems() -> list[tuple[list[int], int]]:
    """Two short prompts, less and more than a KV block long, with canvases of 12."""
    generator = torch.Generator().manual_seed(6)
    return [
        (torch.randint(0, MASK, (size,), generator=generator).tolist(), 12) for size in (19, 41)
    ]


def requests_of(configs: dict[str, dict[str, Any]], count: int = 2) -> list[dict[str, Any]]:
    return [
        {"prompt_token_ids": prompt, "max_tokens": max_tokens, "id": (index, name)}
        | {f"elastic_{key}": value for key, value in config.items()}
        for name, config in configs.items()
        for index, (prompt, max_tokens) in enumerate(problems()[:count])
    ]


def assert_equals_oracle(
    served: Served, configs: dict[str, dict[str, Any]], hidden_stride: int = 1, count: int = 2
) -> None:
    """All at once, in the engine's batches of 8; every request's passes and tokens."""
    results = served.engine.run(requests_of(configs, count))  # type: ignore[attr-defined]
    asked = problems()
    equal = []
    for result in results:
        index, name = result["id"]
        config = dict(configs[name])
        if config["policy"].startswith("elastic"):
            config["hidden_stride"] = hidden_stride
        prompt, max_tokens = asked[index]
        expected = ask_oracle(served, prompt, max_tokens, config)
        equal.append(agrees(result, expected, result["id"]))
    assert equal.count(False) <= 1, "near ties are rare"
    if len(configs) == len(CONFIGS):
        kinds = {p["kind"] for result in results for p in result["steps"]}
        assert kinds == {"first", "window", "replay", "full", "refresh"}


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_equals_oracle(count: int, served: Served) -> None:
    """Each policy and both statistics, mixed in one batch."""
    workers(served, poison_worker)
    assert_equals_oracle(served, CONFIGS, count=count)


@pytest.mark.parametrize("way", ["layers", "whole passes"])
@pytest.mark.slow
def test_graphs_equal_oracle(way: str, served: Served) -> None:
    """Sums over ranks are in them; and every pass is run eagerly too (``checked_passes``)."""
    workers(served, poison_worker)
    workers(served, {"layers": by_layers_graphs, "whole passes": by_whole_passes}[way])
    try:
        names = ["none", "released-high", "dual-cache", "block-fine", "next-low"]
        for name in names:  # one by one: of several, one whose rows join later keeps passes apart
            assert_equals_oracle(served, {name: CONFIGS[name]}, count=1)
    finally:
        first, second = workers(served, as_before)
    assert first == second
    assert first[{"layers": "all", "whole passes": "whole"}[way]] > 20, first


def by_layers_graphs(worker: Any) -> None:
    """Runs in a worker: every pass twice, the first time by each layer's graphs."""
    from .test_graphs import CheckedGraphs

    worker.before = contextlib.ExitStack(), worker.model_runner._executor
    worker.model_runner._executor = CheckedGraphs(worker.model_runner)


def by_whole_passes(worker: Any) -> None:
    """Runs in a worker: the first time by one graph."""
    from .plain_attention import plain_attention
    from .test_graphed_passes import CheckedPasses

    runner, attention = worker.model_runner, contextlib.ExitStack()
    worker.before = attention, runner._executor
    if not ON_CARD:
        attention.enter_context(plain_attention(runner))
    runner._executor = CheckedPasses(runner)


def as_before(worker: Any) -> dict[str, int]:
    """Runs in a worker: how many passes of each kind there were."""
    passes = worker.model_runner._executor.passes
    attention, worker.model_runner._executor = worker.before
    attention.close()
    return dict(passes)


@pytest.mark.long
def test_two_passes_in_flight(directory_of: Callable[[str], tuple[LLaDA, Path]]) -> None:
    """``--async-scheduling``: ranks are sent the next pass while they are at one."""
    with on_cpus():
        served = start(*directory_of("gqa-tied"), "gqa-tied", "mp", async_scheduling=True)
        try:
            engine: Any = served.engine
            assert engine.llm.llm_engine.engine_core.engine_core.batch_queue is not None
            workers(served, poison_worker)
            names = ["none", "released-high", "paper-low", "next-high", "interval", "block-fine"]
            assert_equals_oracle(served, {name: CONFIGS[name] for name in names})
        finally:
            end_ranks(served.engine)


@pytest.mark.slow
def test_adapters_equal_oracle(
    directory_of: Callable[[str], tuple[LLaDA, Path]], tmp_path: Path
) -> None:
    """Each rank has its share of a layer, of an adapter's matrices, and of the head's."""
    oracle, directory = directory_of("dream")
    changed = write_adapter(tmp_path, weights_of(oracle), everything, size=2.0)
    adapted = Served("adapted", directory, with_weights(oracle, changed), None)
    served = start(oracle, directory, "dream", "mp", enable_lora=True)
    try:
        workers(served, poison_worker)
        names = ["none", "released-high", "block-fine"]
        asked = requests_of({name: CONFIGS[name] for name in names})
        for request in asked[::2]:
            request["lora_request"] = LoRARequest("a", 1, str(tmp_path))
        results = served.engine.run(asked)  # type: ignore[attr-defined]
        for request, result in zip(asked, results, strict=True):
            whose = adapted if "lora_request" in request else served
            index, name = result["id"]
            prompt, max_tokens = problems()[index]
            expected = ask_oracle(whose, prompt, max_tokens, CONFIGS[name])
            assert agrees(result, expected, result["id"])
        # One that a rank alone cannot load ends its requests; the ranks go on in step.
        workers(served, unable_to_load)
        llm, params = served.engine.llm, SamplingParams(max_tokens=12, detokenize=False)  # type: ignore[attr-defined]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in problems()]
        for number, reasons in ((2, ["error", "length"]), (1, ["length", "length"])):
            adapter = LoRARequest(str(number), number, str(tmp_path))
            outputs = llm.generate(prompts, params, lora_request=[adapter, None])
            assert [output.outputs[0].finish_reason for output in outputs] == reasons
        results = served.engine.run([asked[0]])  # type: ignore[attr-defined]
        index, name = results[0]["id"]
        prompt, max_tokens = problems()[index]
        expected = ask_oracle(adapted, prompt, max_tokens, CONFIGS[name])
        assert agrees(results[0], expected, "afterwards")
    finally:
        end_ranks(served.engine)


def unable_to_load(worker: Any) -> None:
    """Runs in a worker: the second one cannot load the adapter of number 2."""
    manager = worker.model_runner.adapters._worker
    load = manager._load_adapter

    def failing(asked: Any) -> Any:
        if worker.rank == 1 and asked.lora_int_id == 2:
            raise OSError("this disk is gone")
        return load(asked)

    manager._load_adapter = failing


def poison_worker(worker: Any) -> None:
    """Runs in a worker: KV blocks hold NaN."""
    for cache in worker.model_runner.kv_caches.values():
        cache.fill_(float("nan"))


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.long] if name == "illada" else []) for name in FAMILIES],
)
@pytest.mark.slow
def test_families_equal_oracle(family: str, tmp_path: Path) -> None:
    """iLLaDA: a tied head whose rows the ranks share. LLaDA-MoE: a share of every expert. Both: one
    KV head for each rank, and answers that grow."""
    oracle = save_family(family, tmp_path)
    served = start(oracle, tmp_path, family, "mp")
    try:
        workers(served, poison_worker)
        names = ["none", "released-high", "block-topk"]
        configs = {name: CONFIGS[name] | {"grow_by": 8} for name in names}
        assert_equals_oracle(served, configs, count=1)
    finally:
        end_ranks(served.engine)


def assert_traffic_follows_the_formula(
    served: Served, names: list[str], row_budget: int, hidden_stride: int = 1
) -> None:
    """Calls and bytes of each pass, on both ranks: docs/deploy.md."""
    scheduler = served.engine.scheduler  # type: ignore[attr-defined]
    plans = []
    schedule = scheduler.schedule

    def kept(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        if output.elastic_plans:
            plans.append(list(output.elastic_plans))
        return output

    workers(served, count_collectives)
    scheduler.schedule = kept
    try:
        requests = requests_of({name: CONFIGS[name] for name in names}, count=1)
        served.engine.run(requests)  # type: ignore[attr-defined]
    finally:
        del scheduler.schedule
    first, second = workers(served, take_collectives)
    shape = served.oracle.config, RANKS, row_budget, hidden_stride
    expected = [expected_traffic(step, *shape) for step in plans]
    assert first == expected
    assert second == expected
    assert any(traffic["all_gather"] > 2 for traffic in expected), "tests, and rows joined late"


def test_traffic_follows_the_formula(served: Served) -> None:
    names = ["released-high", "paper-high", "always", "block-fine", "next-low", "dual-cache"]
    assert_traffic_follows_the_formula(served, names, row_budget=8192)


def test_each_rank_keeps_its_share(served: Served) -> None:
    """Neither keys and values nor hidden states are stored twice."""
    config = served.oracle.config
    head_dim = config.d_model // config.n_heads
    whole = config.n_layers * 2 * config.n_kv_heads * head_dim
    whole += (config.n_layers - 1) * config.d_model
    for share in workers(served, bytes_of_a_position):
        assert share == whole * 4 / RANKS


def bytes_of_a_position(worker: Any) -> float:
    """Runs in a worker: what its paged cache holds, for each slot."""
    runner = worker.model_runner
    caches = [layer.kv_cache for layer in runner.model.attention_layers]
    caches += [store.kv_cache for store in runner.model.hidden_states]
    slots = caches[0].shape[0] * runner.cache.block_size
    return sum(cache.nbytes for cache in caches) / slots


def test_sampled_answers_equal_one_rank(served: Served) -> None:
    """Random numbers are a function of seed, step and position, not of the rank."""
    from vllm import SamplingParams

    from vllm_elastic.bench.engine import BenchEngine

    alone = BenchEngine(
        served.directory,
        batch_size=8,
        max_model_len=128,
        kv_cache_memory_bytes=16 << 20,
        elastic_config=ORACLES_DEFAULTS,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in problems()]
    params = SamplingParams(
        temperature=0.8,
        top_p=0.9,
        seed=11,
        logprobs=3,
        max_tokens=12,
        detokenize=False,
        stop_token_ids=[EOS],
        extra_args={"elastic_gamma": 0.9},
    )
    answers = []
    for engine in (alone, served.engine):
        outputs = engine.llm.generate(prompts, params, use_tqdm=False)  # type: ignore[attr-defined]
        engine.scheduler.records.clear()  # type: ignore[attr-defined]
        answers.append([output.outputs[0] for output in outputs])
    for one, two in zip(*answers, strict=True):
        assert list(one.token_ids) == list(two.token_ids)
        for expected, found in zip(one.logprobs, two.logprobs, strict=True):
            assert expected.keys() == found.keys()
            for token, wanted in expected.items():
                assert found[token].logprob == pytest.approx(wanted.logprob, abs=1e-4)


@pytest.mark.slow
def test_row_chunks_shared_kv_heads_and_every_other_hidden_state(
    directory_of: Callable[[str], tuple[LLaDA, Path]],
) -> None:
    """A canvas beyond the row budget; fewer KV heads than ranks; inputs of some layers kept."""
    stride = {"hidden_stride": 2}
    served = start(
        *directory_of("dream-mqa"),
        "dream-mqa",
        "mp",
        row_budget=ROW_BUDGET,
        elastic_config=stride,
    )
    try:
        names = ["none", "released-high", "paper-low", "block", "next-high"]
        assert_equals_oracle(served, {name: CONFIGS[name] for name in names}, **stride, count=1)
        names = ["always", "paper-high", "next-low", "block-fine"]
        assert_traffic_follows_the_formula(served, names, ROW_BUDGET, **stride)
    finally:
        end_ranks(served.engine)


@pytest.fixture
def ray_with_two_devices() -> Iterator[None]:
    """A Ray of this test's own; nobody else's is looked for, joined or stopped."""
    ray = pytest.importorskip("ray")
    # Short: Ray keeps sockets there, whose paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="ray")
    ray.init(
        address="local",
        num_cpus=RANKS,
        num_gpus=RANKS,
        object_store_memory=80 << 20,
        include_dashboard=False,
        _temp_dir=folder,
    )
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    "names",
    [("none", "released-high", "block-fine"), pytest.param(CONFIGS, marks=pytest.mark.long)],
    ids=["some", "all"],
)
@pytest.mark.slow
def test_ray_equals_oracle(
    names: Collection[str],
    ray_with_two_devices: None,
    directory_of: Callable[[str], tuple[LLaDA, Path]],
) -> None:
    """The same ranks as Ray's actors: patches/ray_on_cpu."""
    served = start(*directory_of("dream"), "dream", "ray")
    try:
        executor = served.engine.llm.llm_engine.engine_core.engine_core.model_executor  # type: ignore[attr-defined]
        assert executor.uses_ray
        assert_equals_oracle(served, {name: CONFIGS[name] for name in names})
    finally:
        end_ranks(served.engine)
