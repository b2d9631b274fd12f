# SPDX-License-Identifier: Apache-2.0
"""`bench plan` against the tensors that the oracle and vLLM's layers make, and against the docs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.device import DEVICE
from tests.engine.test_family_configs import ILLADA, LLADA_MOE
from tests.live_bytes import LiveBytes
from tests.quantised import quantise
from tests.qwen2_oracle import DREAM
from tests.tiny_llada_v import TinyLLaDAV
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.rank_memory import GIB
from vllm_elastic.bench.simulation import model_shape
from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.engine.optimisations import MOST_ROWS_OF_A_WHOLE_PASS
from vllm_elastic.models.llada_v_config import LLaDAVConfig
from vllm_elastic.models.registry import traits_of
from vllm_elastic.models.rows import bucket
from vllm_elastic.reference.config import LLaDAConfig as OracleConfig
from vllm_elastic.reference.llada import weight_shapes
from vllm_elastic.runner import candidates, head
from vllm_elastic.runner.executor import GraphExecutor
from vllm_elastic.runner.graphed_block import StaticRows, Tensors
from vllm_elastic.runner.graphed_pass import AllQueries
from vllm_elastic.runner.statistics import memory
from vllm_elastic.runner.trial_run import trial_run
from vllm_elastic.runner.upload import Upload

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny_llada" / "checkpoint"

# Shared KV heads, fewer of them than four ranks; a vocabulary to be padded; tied and untied ends.
GROUPED: dict[str, Any] = dict(
    json.loads((TINY / "config.json").read_text()),
    d_model=256, n_heads=8, n_kv_heads=2, n_layers=5, mlp_hidden_size=384,
    vocab_size=300, embedding_size=300,
)  # fmt: skip
LLADA_8B: dict[str, Any] = dict(
    GROUPED,
    d_model=4096, n_heads=32, n_kv_heads=32, n_layers=32, mlp_hidden_size=12288,
    vocab_size=126464, embedding_size=126464, max_sequence_length=4096,
)  # fmt: skip
MODELS = {"grouped": GROUPED, "tied": dict(GROUPED, weight_tying=True), "llada-8b": LLADA_8B}
MODELS |= {"dream": DREAM, "illada": ILLADA, "llada-moe": LLADA_MOE}


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Runs the command: its exit status, what it printed, and the file of ``--json``."""

    def run(*words: object) -> SimpleNamespace:
        path = tmp_path / "plan.json"
        path.unlink(missing_ok=True)
        status: Any = 0
        try:
            args = make_parser().parse_args(["plan", *map(str, words), "--json", str(path)])
            args.function(args)
        except SystemExit as error:
            status = error.code
        printed = capsys.readouterr()
        written = json.loads(path.read_text()) if path.exists() else None
        return SimpleNamespace(
            status=status, out=printed.out, err=" ".join(printed.err.split()), json=written
        )

    return run


@pytest.fixture
def model(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Writes a config.json."""

    def write(config: object) -> Path:
        directory = tmp_path / "model"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture
def one_of_several_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Builds the model that a rank would build; on the meta device that is shapes and no memory."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding

    from vllm_elastic.models.registry import FAMILIES
    from vllm_elastic.plugin import register

    register()
    dtype = torch.get_default_dtype()

    def build(
        directory: Path, ranks: int, rank: int, hidden_stride: int, device: str = "meta"
    ) -> tuple[Any, Any]:
        config = EngineArgs(
            model=str(directory),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            additional_config={"elastic": {"hidden_stride": hidden_stride}},
        ).create_engine_config()
        group = SimpleNamespace(world_size=ranks, rank_in_group=rank)
        monkeypatch.setattr(parallel_state, "_TP", group)
        # vLLM keeps these for later models, and those of the meta device have no numbers.
        monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
        for other in ("_PCP", "_DP"):  # experts ask for them
            alone = SimpleNamespace(world_size=1, rank_in_group=0)
            monkeypatch.setattr(parallel_state, other, alone)
        torch.set_default_dtype(torch.bfloat16)
        with set_current_vllm_config(config), torch.device(device):
            family = FAMILIES[config.model_config.architecture]
            return resolve_name(family.model)(vllm_config=config), config

    yield build
    torch.set_default_dtype(dtype)


def bytes_of(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_one_rank_holds_the_oracles_tensors(plan: Any, dtype: str) -> None:
    """The tiny model's sizes need no padding, so nothing is added to them."""
    shapes = weight_shapes(OracleConfig.from_pretrained(TINY)).values()
    numbers = sum(math.prod(shape) for shape in shapes)
    (rank,) = plan("--model", TINY, "--memory", 1, "--dtype", dtype).json["ranks"]
    assert rank["weights"] == numbers * {"bfloat16": 2, "float32": 4}[dtype]


def test_quantised_weights_are_those_of_a_checkpoint(plan: Any, tmp_path: Path) -> None:
    """4 bits in groups of 32 with a scale of 16 each: 4.5; what is not quantised has 16."""
    quantise(TINY, tmp_path / "packed", "packed")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    kept = [tensor for name, tensor in tensors.items() if not name.endswith("weight_shape")]
    (rank,) = plan("--model", TINY, "--memory", 1, "--weight-bits", 4.5).json["ranks"]
    assert rank["weights"] == bytes_of(kept)


@pytest.mark.parametrize("name", ["grouped", "tied"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shares_add_up_to_the_oracles_tensors(plan: Any, model: Any, name: str, ranks: int) -> None:
    """All ranks together: every tensor once, norms on each, padding, and copies of KV heads."""
    directory = model(MODELS[name])
    config = OracleConfig.from_pretrained(directory)
    numbers = 0
    for tensor, shape in weight_shapes(config).items():
        size = math.prod(shape)
        if len(shape) == 1:
            size *= ranks
        elif tensor.endswith(("wte.weight", "transformer.ff_out.weight")):
            size += (320 - 300) * config.d_model
        elif tensor.endswith(("k_proj.weight", "v_proj.weight")):
            size *= max(1, ranks // config.n_kv_heads)
        numbers += size
    (rank,) = plan("--model", directory, "--memory", 1, "--tp", ranks).json["ranks"]
    assert rank["weights"] * ranks == numbers * 2


@pytest.mark.parametrize(
    ("name", "ranks", "stride"),
    [("grouped", 1, 1), ("grouped", 2, 2), ("grouped", 4, 3), ("tied", 2, 1), ("llada-8b", 1, 1),
     ("llada-8b", 2, 4), ("llada-8b", 8, 1), ("llada-8b", 32, 16),
     ("dream", 1, 1), ("dream", 4, 2), ("illada", 1, 1), ("illada", 16, 1),
     ("llada-moe", 1, 1), ("llada-moe", 4, 3)],
)  # fmt: skip
def test_a_rank_is_what_vllm_builds(
    plan: Any, model: Any, one_of_several_ranks: Any, name: str, ranks: int, stride: int
) -> None:
    """The last rank's parameters, and the pages that its layers ask vLLM for."""
    directory = model(MODELS[name])
    words = ["--model", directory, "--memory", 80, "--tp", ranks, "--hidden-stride", stride]
    (rank,) = plan(*words).json["ranks"]
    built, config = one_of_several_ranks(directory, ranks, ranks - 1, stride)
    assert rank["weights"] == bytes_of(built.parameters())
    pages = {
        "keys_values_of_position": [
            layer.get_kv_cache_spec(config) for layer in built.attention_layers
        ],
        "hidden_states_of_position": [
            store.get_kv_cache_spec(config) for store in built.hidden_states
        ],
    }
    for part, specs in pages.items():
        block_size = plan(*words).json["block_size"]
        assert {spec.block_size for spec in specs} == {block_size}
        assert rank[part] * block_size == sum(spec.page_size_bytes for spec in specs)


@pytest.mark.parametrize(
    ("name", "parameters", "position"),
    [
        ("llada-8b", 8_015_581_184, 524_288 + 253_952),
        ("dream", 7_615_616_512, 57_344 + 193_536),  # Qwen2.5-7B's
        ("illada", 7_615_025_152, 131_072 + 253_952),
        ("llada-moe", 7_356_880_896, 131_072 + 61_440),
    ],
)
def test_sizes_of_each_family(
    plan: Any, model: Any, name: str, parameters: int, position: int
) -> None:
    """Its config.json's own keys; the counts were worked out from the released tensors' shapes."""
    (rank,) = plan("--model", model(MODELS[name]), "--memory", 80).json["ranks"]
    assert (rank["weights"], rank["position"]) == (2 * parameters, position)


def test_experts_make_a_step_larger(plan: Any, model: Any) -> None:
    """Eight experts' numbers of a row, and not one MLP's of their width."""
    step = {}
    for experts in (2, 8):  # of one alone queries, keys and values are more
        raw = LLADA_MOE | {"num_experts_per_tok": experts}
        words = ("--model", model(raw), "--memory", 80, "--max-num-seqs", 1, "--window", 1)
        (rank,) = plan(*words, "--max-window", 1, "--row-budget", 65536).json["ranks"]
        step[experts] = rank["step"]
    # max(2 * 1,024, 2,048) + 1,024 numbers of 2 bytes
    assert step[8] - step[2] == 65536 * 6 * 3072 * 2


def documented(page: str, first: str) -> list[list[int]]:
    """The rows of the table that begins with these words, as numbers."""
    _, _, rest = (ROOT / "docs" / page).read_text().partition(f"| {first} |")
    rows = re.findall(r"^\|(.*)\|$", rest.split("\n\n")[0], re.M)
    cells = [re.findall(r"[\d,]+", row) for row in rows]
    return [[int(number.replace(",", "")) for number in row] for row in cells if row]


def test_documented_bytes_of_a_position(plan: Any) -> None:
    """docs/deploy.md, Memory of a rank."""
    rows = documented("deploy.md", "ranks | keys and values | hidden states")
    assert [row[0] for row in rows] == [1, 2, 4, 8]
    found = plan("--model", "llada-8b", "--memory", 80, "--tp", 1, 2, 4, 8).json["ranks"]
    parts = ("ranks", "keys_values_of_position", "hidden_states_of_position", "position")
    assert [[rank[part] for part in parts] for rank in found] == [row[:4] for row in rows]


def test_documented_bytes_with_a_stride(plan: Any) -> None:
    """docs/policies.md, Memory: hidden_stride."""
    rows = documented("policies.md", "`hidden_stride` | hidden states")
    assert [row[0] for row in rows] == [1, 2, 4, 8, 16]
    for stride, hidden, layers, both in rows:
        words = ("--model", "llada-8b", "--memory", 80, "--hidden-stride", stride)
        (rank,) = plan(*words).json["ranks"]
        assert (rank["hidden_states_of_position"], rank["position"]) == (hidden, both)
        assert hidden == layers * 4096 * 2


def test_plain_name_is_the_released_config(plan: Any, model: Any) -> None:
    words = ("--memory", 80, "--tp", 1, 4)
    named = plan("--model", "llada-8b", *words).json
    directory = model(LLADA_8B)
    for path in (directory, directory / "config.json"):
        read = plan("--model", path, *words).json
        assert {**read, "model": "llada-8b"} == named


def test_a_model_that_takes_images(plan: Any, model: Any) -> None:
    """Its tower and projector, and layer 0's input of every position."""
    tiny = TinyLLaDAV()
    directory = model(tiny.config_json())
    (rank,) = plan("--model", directory, "--memory", 1, "--dtype", "float32").json["ranks"]
    text = tiny.oracle.weights.values()
    of_images = LLaDAVConfig(**tiny.config_json()).image_parameters
    assert rank["weights"] == bytes_of(text) + 4 * of_images
    layers, width = tiny.oracle.config.n_layers, tiny.oracle.config.d_model
    assert rank["hidden_states_of_position"] == 4 * layers * width
    (released,) = plan("--model", "llada-v", "--memory", 80).json["ranks"]
    (of_text,) = plan("--model", "llada-8b", "--memory", 80).json["ranks"]
    assert released["position"] == of_text["position"] + 2 * 4096
    assert 0.8e9 < released["weights"] - of_text["weights"] < 0.9e9


def test_left_is_filled_with_whole_canvases(plan: Any) -> None:
    """LLaDA-8B on two ranks, worked out by hand; one block of 32 positions is vLLM's own."""
    words = ("--model", "llada-8b", "--memory", 80, "--tp", 2, "--canvas", 1000)
    (rank,) = plan(*words, "--row-budget", 1024, "--max-num-seqs", 64).json["ranks"]
    # 4,000 rows in 32 layers: half of a row, but 1,000 old inputs whole; 64 seats' totals; and
    # the statistics' 2^26 numbers four times, which are more than 1,024 rows take.
    kept = 32 * (4000 * 2048 + 1000 * 2048) * 2 + 32 * 64 * 1000 * 4
    assert rank["step"] == kept + 2**26 * 16
    assert rank["graphs"] == 0  # of several ranks
    assert rank["left"] == int(80 * GIB * 0.9) - rank["weights"] - rank["step"]
    blocks = rank["left"] // (32 * 389_120) - 1
    assert rank["positions"] == 32 * blocks
    assert rank["canvases"] == blocks // 32  # 1,000 positions: 31.25 blocks


# What decides, and the words and bounds with which it does.
PHASES: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "logits": ({}, {"logits": 22}),
    "layer": ({}, {}),
    "chunks": ({"--canvas": 1024, "--row-budget": 256}, {}),
    "projection": ({"--canvas": 1024, "--row-budget": 64}, {}),
    "statistics": ({}, {"attention": 22}),
    "saved": ({"--max-window": 256, "--window": 256}, {"attention": 20}),
    "totals": ({"--max-num-seqs": 512}, {"attention": 20}),
}


@pytest.mark.parametrize(
    "phase",
    [pytest.param(p, marks=[] if p == "statistics" else [pytest.mark.slow]) for p in PHASES],
)
def test_step_is_what_the_trial_run_holds(
    plan: Any,
    model: Any,
    one_of_several_ranks: Any,
    phase: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """LLaDA-8B's proportions, with one layer; the bounds are a GPU's, but lower."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    changes, bounds = PHASES[phase]
    logits, attention = 1 << bounds.get("logits", 16), 1 << bounds.get("attention", 12)
    assert candidates._NUMBERS_AT_ONCE[0] == head.LOGITS_AT_ONCE
    for module in (head, model_shape):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", logits)
    monkeypatch.setattr(candidates, "_NUMBERS_AT_ONCE", (logits, logits))
    monkeypatch.setattr(memory, "MOST_NUMBERS_AT_ONCE", attention)

    sizes = dict(d_model=256, n_heads=2, n_kv_heads=2, n_layers=1, mlp_hidden_size=768)
    directory = model(GROUPED | sizes | dict(vocab_size=7904, embedding_size=7904))
    words = {"--row-budget": 1024, "--canvas": 512, "--max-num-seqs": 8, "--memory": 1}
    words |= {"--window": 16, "--max-window": 16} | changes
    planned = plan("--model", directory, *(word for pair in words.items() for word in pair)).json
    (rank,) = planned["ranks"]
    built, config = one_of_several_ranks(directory, 1, 0, 1, device=DEVICE.type)
    limits = StepLimits.of(
        *(planned[name] for name in ("row_budget", "seats", "window", "max_window", "canvas"))
    )
    traits = traits_of(config.model_config.hf_config)
    with torch.inference_mode():
        for parameter in built.parameters():
            parameter.zero_()
        process_weights_after_loading(built, config.model_config, DEVICE)
        upload = Upload(DEVICE)
        with LiveBytes() as live:
            trial_run(built, traits, limits, planned["seats"], planned["canvas"], upload)
    # The CPU's SwiGLU makes one tensor of the MLP's width more than a GPU's fused kernel.
    assert 0.99 <= live.peak / rank["step"] <= (1.25 if phase in ("layer", "chunks") else 1.02)


class LargestPool:
    """Runs what would be captured; counts what the graph that makes the most has alive."""

    def __init__(self) -> None:
        self.peak = 0

    def capture(self, work: Callable[[], Tensors]) -> Any:
        with LiveBytes() as live:
            work()
        self.peak = max(self.peak, live.peak)
        return None


@pytest.mark.parametrize("mlp", [768, 64], ids=["finish", "project"])
@pytest.mark.parametrize("most", [None, 40])
def test_graphs_are_what_the_executor_holds(
    plan: Any, model: Any, one_of_several_ranks: Any, mlp: int, most: int | None
) -> None:
    """What the graphs read, and beside it what the largest of them makes."""
    from vllm.model_executor.model_loader.utils import process_weights_after_loading

    directory = model(GROUPED | dict(n_layers=2, mlp_hidden_size=mlp))
    words = ["--model", directory, "--memory", 80, "--row-budget", 512]
    words += ["--max-cudagraph-capture-size", most] if most else []
    planned = plan(*words).json
    (rank,) = planned["ranks"]
    (without,) = plan(*words, "--enforce-eager").json["ranks"]
    assert (without["graphs"], without["left"] - rank["left"]) == (0, rank["graphs"])
    assert planned["graph_rows"] == bucket(most or 512)
    built, config = one_of_several_ranks(directory, 1, 0, 1, device=DEVICE.type)
    executor, pool = GraphExecutor(built), LargestPool()
    process_weights_after_loading(built, config.model_config, DEVICE)
    with LiveBytes() as held, torch.inference_mode():
        static = StaticRows(planned["graph_rows"], built)
    rows = static.x, static.positions, static.attended
    assert sum(held.sizes.values()) == bytes_of(rows)
    with torch.inference_mode():
        executor.capture(pool, sorted({bucket(n) for n in range(1, planned["graph_rows"] + 1)}))
    held_by_code = (bytes_of(rows) + pool.peak) / rank["graphs"]
    # The CPU's SwiGLU makes one tensor of the MLP's width more than a GPU's fused kernel.
    assert 0.98 <= held_by_code <= (1.25 if mlp == 768 else 1.02)


def test_what_graphs_of_whole_passes_keep(plan: Any, model: Any, one_of_several_ranks: Any) -> None:
    """The queries of every fourth layer, from the last one down."""
    directory = model(GROUPED | dict(n_layers=6))
    words = ["--model", directory, "--memory", 80]
    (without,), (rank,) = (plan(*words, *more).json["ranks"] for more in ((), ("--whole-passes",)))
    built, _ = one_of_several_ranks(directory, 1, 0, 1, device=DEVICE.type)
    queries = AllQueries(built, MOST_ROWS_OF_A_WHOLE_PASS, range(5, -1, -4))
    kept = bytes_of(tuple(queries._kept.values()))
    assert rank["graphs"] - without["graphs"] == without["left"] - rank["left"] == kept > 0


def test_table_and_file_say_the_same(plan: Any) -> None:
    ran = plan("--model", "llada-8b", "--memory", 24, "--tp", 1, 2, 8)
    assert ran.status == 0
    rows = [row.strip("|").split("|") for row in ran.out.splitlines() if row.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["1", "2", "8"]
    for row, rank in zip(rows, ran.json["ranks"], strict=True):
        weights, step, graphs, left = (float(cell) for cell in row[1:5])
        assert graphs == pytest.approx(rank["graphs"] / GIB, rel=0.05)
        assert weights == pytest.approx(rank["weights"] / GIB, rel=0.01)
        assert step == pytest.approx(rank["step"] / GIB, rel=0.01)
        assert left == pytest.approx(rank["left"] / GIB, rel=0.01)
        exact = [int(cell.replace(",", "")) for cell in row[5:8]]
        assert exact == [rank["position"], rank["positions"], rank["canvases"]]


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (
            ["--memory", "25", "--max-num-seqs", "1024", "--row-budget", "16384"],
            {"--tp", "--weight-bits", "--max-num-seqs", "--canvas", "--memory"},
        ),
        (
            ["--memory", "43", "--dtype", "float32", "--max-num-seqs", "16"],
            {"--tp", "--hidden-stride", "--dtype", "--weight-bits"}
            | {"--max-window", "--canvas", "--memory"},
        ),
        (["--memory", "16", "--tp", "32"], set()),
    ],
)
def test_each_remedy_is_enough(plan: Any, words: list[str], kinds: set[str]) -> None:
    ran = plan("--model", "llada-8b", *words)
    (rank,) = ran.json["ranks"]
    assert (ran.status, rank["canvases"] == 0) == ((1, True) if kinds else (0, False))
    found = dict(remedy.split() for remedy in rank["remedies"] or [])
    assert set(found) == kinds
    for flag, value in found.items():
        assert f"{flag} {value}" in ran.out
        changed = plan("--model", "llada-8b", *words, flag, value)
        assert changed.status == 0, (flag, value)
        assert changed.json["ranks"][0]["canvases"] > 0


def test_least_remedies(plan: Any) -> None:
    """One less of what is proposed is not enough."""
    words = ["--model", "llada-8b", "--memory", "42", "--dtype", "float32", "--max-num-seqs", "16"]
    found = dict(remedy.split() for remedy in plan(*words).json["ranks"][0]["remedies"])
    for flag in ("--hidden-stride", "--memory"):
        assert plan(*words, flag, int(found[flag]) - 1).status == 1
    assert plan(*words, "--canvas", int(found["--canvas"]) + 1).status == 1


def test_says_what_is_missing(plan: Any) -> None:
    ran = plan("--model", "llada-8b", "--memory", 16)
    assert "1 rank: no canvas of 4,096 fits; weights, step and graphs take" in ran.out
    ran = plan("--model", "llada-8b", "--memory", 20, "--max-num-seqs", 16)
    assert "1 rank: no canvas of 4,096 fits; it takes 2.97 GiB and" in ran.out


def test_windows_beyond_the_default_limit(plan: Any) -> None:
    """Whoever raises max_window could not plan for it."""
    words = ("--model", "llada-8b", "--memory", 80, "--max-num-seqs", 2)
    narrow, wide = (plan(*words, "--window", n, "--max-window", n) for n in (1024, 2048))
    assert (narrow.status, wide.status) == (0, 0)
    assert wide.json["ranks"][0]["step"] > narrow.json["ranks"][0]["step"]


BAD: list[tuple[list[object], str]] = [
    (["--tp", 0], "argument --tp/--tensor-parallel-size: must be a whole number from 1, got '0'"),
    (["--tp", 2, 5], "argument --tp: 5 ranks cannot share 32 heads and 32 KV heads and an MLP"),
    (["--tp", 64], "evenly; use 1, 2, 4, 8, 16, 32"),
    (["--tp", 2.5], "must be a whole number from 1, got '2.5'"),
    (["--memory", "nan"], "argument --memory: must be a number of GiB above 0, got 'nan'"),
    (["--memory", "-1"], "argument --memory"),
    (["--memory", "80GB"], "argument --memory: must be a number of GiB above 0, got '80GB'"),
    (["--gpu-memory-utilization", 1.1], "must be above 0 and at most 1, got '1.1'"),
    (["--gpu-memory-utilization", 0], "must be above 0 and at most 1, got '0'"),
    (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
    (["--weight-bits", "0.5"], "argument --weight-bits: must be from 1 to 32 bits, got '0.5'"),
    (["--weight-bits", "int4"], "argument --weight-bits: must be from 1 to 32 bits, got 'int4'"),
    (["--hidden-stride", 32], "argument --hidden-stride: 32 stores no hidden state of a model of 32"
        " layers; lower it to at most 31"),
    (["--hidden-stride", 2048], "hidden_stride"),
    (["--canvas", 4097], "argument --canvas: 4097 positions, but the model was made for 4096"),
    (["--row-budget", 128], "argument --row-budget: 128 rows are fewer than the 256 requests"),
    (["--model", "no/such/model"], "argument --model: there is no file no/such/model"),
    (["--model", "README.md"], "argument --model: README.md cannot be read as a model's"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda value: None)
def test_bad_value_is_named(
    plan: Any, monkeypatch: pytest.MonkeyPatch, words: list[object], message: str
) -> None:
    monkeypatch.chdir(ROOT)
    ran = plan("--model", "llada-8b", "--memory", 80, *words)
    assert (ran.status, ran.out, ran.json) == (2, "", None)
    assert message in ran.err
    assert "usage: " in ran.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "256"}, "d_model must be a whole number"),
        ({"n_layers": 0}, "n_layers must be a whole number from 1, got 0"),
        ({"n_heads": 0}, "config.json cannot be read as a model's"),
        ({"n_heads": 3}, "d_model 256 is no multiple of n_heads 3"),
        ({"mlp_hidden_size": None}, "mlp_hidden_size must be given"),
        ({"block_type": "sequential"}, "block_type='sequential' is not supported"),
    ],
)
def test_bad_config_is_named(plan: Any, model: Any, change: dict[str, Any], message: str) -> None:
    ran = plan("--model", model(GROUPED | change), "--memory", 80)
    assert ran.status == 2
    assert message in ran.err


def test_config_of_another_model(plan: Any, model: Any) -> None:
    ran = plan("--model", model({"hidden_size": 64, "model_type": "llama"}), "--memory", 80)
    assert ran.status == 2
    assert "its architectures are [], and those that are served are LLaDAModelLM, " in ran.err
    ran = plan("--model", model(GROUPED | {"hidden_size": 64}), "--memory", 80)
    assert "hidden_size is no key of LLaDA-8B's" in ran.err
    lacking = {key: value for key, value in DREAM.items() if key != "rope_theta"}
    assert "rope_theta must be given" in plan("--model", model(lacking), "--memory", 80).err


def test_rows_of_the_vocabulary_are_shared_too(plan: Any, model: Any) -> None:
    """vLLM's start would end in an assertion: 320 padded rows on three ranks."""
    config = dict(GROUPED, d_model=192, n_heads=3, n_kv_heads=3)
    ran = plan("--model", model(config), "--memory", 80, "--tp", 3)
    assert ran.status == 2
    assert "3 ranks cannot share 320 (padded) rows of the vocabulary evenly; use 1" in ran.err


def test_documented_table_of_what_fits(plan: Any) -> None:
    """docs/deploy.md, What fits where: the rows that the commands above the table print."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    _, _, section = text.partition("## What fits where")
    commands = re.findall(r"^python -m vllm_elastic.bench plan (.*)$", section, re.M)
    printed = []
    for command in commands:
        words = command.split()
        memory = words[words.index("--memory") + 1]
        rows = re.findall(r"^\| \d.*$", plan(*words).out, re.M)
        printed += [f"| {memory} {row}" for row in rows]
    table = section[section.index("| GiB of a rank |") :].split("\n\n")[0].splitlines()[2:]
    assert len(commands) == 2
    assert table == printed
