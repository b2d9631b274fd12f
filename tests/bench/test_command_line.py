# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' command lines, as the docs have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.documented_commands import ROOT, arguments, documented
from vllm_elastic.bench.__main__ import make_parser
from vllm_elastic.bench.arguments import prepare_outputs
from vllm_elastic.bench.run import read_jsonl
from vllm_elastic.bench.settings import named_settings
from vllm_elastic.config import STATISTICS

COMMANDS = documented("python -m vllm_elastic.bench")
LOG = documented("python -m vllm_elastic.bench", sorted(ROOT.glob("docs/log/*.md")))
GONE = ("lazy_window", "$policy", "step ")
"""Of the log alone: a knob and a benchmark that are no more, and a value that a loop sets."""
COMMANDS += [command for command in LOG if not any(word in command for word in GONE)]


def test_commands_are_documented() -> None:
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("command", COMMANDS)
def test_documented_command_is_understood(command: str) -> None:
    """A reader would type a command that the docs show and get a usage message."""
    assert callable(make_parser().parse_args(arguments(command)).function)


REQUIRED = {
    "run": ["--prompts", "p", "--out", "o"],
    "settings": ["--problems", "p"],
    "compare": [],
    "tune": ["--prompts", "p"],
}


@pytest.mark.parametrize(
    ("command", "batch_size"), [("run", 1), ("settings", 16), ("compare", [1, 16]), ("tune", 16)]
)
def test_arguments_of_the_engine(command: str, batch_size: int | list[int]) -> None:
    """The same in every benchmark that builds an engine of a given model."""
    words = [command, "--model", "m/", *REQUIRED[command]]
    args = make_parser().parse_args(words)
    assert (args.model, args.batch_size) == (Path("m"), batch_size)
    assert (args.dtype, args.elastic_config) == ("auto", {})
    assert (args.max_model_len, args.kv_cache_memory_bytes) == (None, None)
    words += ["--batch-size", "3", "--dtype", "bfloat16", "--elastic-config", '{"gamma": 0.5}']
    words += ["--max-model-len", "512", "--kv-cache-memory-bytes", "1000000"]
    args = make_parser().parse_args(words)
    assert args.batch_size in (3, [3])
    assert (args.dtype, args.elastic_config) == ("bfloat16", {"gamma": 0.5})
    assert (args.max_model_len, args.kv_cache_memory_bytes) == (512, 1000000)


@pytest.mark.parametrize("command", REQUIRED)
def test_model_is_required(command: str) -> None:
    with pytest.raises(SystemExit):
        make_parser().parse_args([command, *REQUIRED[command]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--count", "0"], "--count: must be a whole number from 1, got '0'"),
        (["run", "--elastic-config", "{bad"], "--elastic-config: '{bad' is not JSON"),
        (["tune", "--elastic-config", '{"windw": 3}'], "unknown parameter 'windw'"),
        (["settings", "--configs", "{}", '{"gamma": 9}'], "'gamma' must be a number"),
        (["settings", "--policies", "static"], "--policies: invalid choice: 'static'"),
        (["compare", "--knobs", '{"elastic": {"gama": 1}}'], "unknown parameter 'gama'"),
        (["plot", "rows.json", "--out", "a.jpg"], "--out: must end in .svg or .png, got 'a.jpg'"),
        (["compare", "--knobs", "[]"], "--knobs: must be a JSON object of knobs by name"),
    ],
)
def test_a_wrong_argument_is_named_before_a_model_is_loaded(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        own = ["--model", "m", *REQUIRED[words[0]]] if words[0] in REQUIRED else []
        make_parser().parse_args([words[0], *own, *words[1:]])
    assert message in capsys.readouterr().err


def test_statistics_without_a_gamma_are_refused() -> None:
    """They would be passed over in silence."""
    words = ["settings", "--model", "m", *REQUIRED["settings"], "--statistics", "paper"]
    with pytest.raises(SystemExit, match="--statistics is of --gammas"):
        named_settings(make_parser().parse_args(words))


def test_settings_are_those_that_are_named() -> None:
    words = ["settings", "--model", "m", *REQUIRED["settings"]]
    assert named_settings(make_parser().parse_args(words)) == [("none", {"elastic_policy": "none"})]
    words += ["--gammas", "0.5", "0.9", "--policies", "interval", "--configs", '{"window": 8}']
    assert [name for name, _ in named_settings(make_parser().parse_args(words))] == [
        "none",
        "interval",
        *(
            f"elastic, {statistic}, gamma {gamma}"
            for statistic in STATISTICS
            for gamma in (0.5, 0.9)
        ),
        "window 8",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "p.jsonl: has no prompt"),
        ("\n{", "p.jsonl:2: not JSON"),
        ("[1]", "p.jsonl:1: needs 'prompt' or 'prompt_token_ids'"),
        ('{"prompt": ""}', "p.jsonl:1: the prompt is empty"),
        ('{"prompt": "a", "max_tokens": "8"}', "p.jsonl:1: max_tokens must be a whole number"),
    ],
)
def test_a_wrong_prompt_is_named_by_file_and_line(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        list(read_jsonl(Path("p.jsonl")))


def test_the_folder_of_the_results_is_there_before_the_work(tmp_path: Path) -> None:
    """A run of hours would end at a folder that is missing, and leave nothing."""
    args = make_parser().parse_args(["run", "--model", "m", "--prompts", "p", "--out", "o"])
    args.out = tmp_path / "new" / "er" / "run.jsonl"
    prepare_outputs(args)
    args.out.write_text("")
    args.out = args.out.parent
    with pytest.raises(SystemExit, match=r"run: --out: .* is a folder; name a file in it"):
        prepare_outputs(args)
    args.out = tmp_path / "new" / "er" / "run.jsonl" / "below-a-file"
    with pytest.raises(SystemExit, match="run: --out: "):
        prepare_outputs(args)
