# SPDX-License-Identifier: Apache-2.0
"""--plugin and --elastic-config on vLLM's command line: patches/cli_flags."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from vllm_elastic.patches import cli_flags

MODEL = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_llada" / "checkpoint")
ARGUMENTS = ["--model", MODEL, "--plugin", "elastic", "--elastic-config", '{"gamma": 0.5}']


def parse(add_cli_args: Any, arguments: list[str]) -> Any:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return add_cli_args(FlexibleArgumentParser()).parse_args(arguments)


@pytest.fixture
def engine_args() -> Any:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_elastic.plugin import register

    register()
    return EngineArgs


def test_flags_end_in_additional_config(engine_args: Any) -> None:
    args = parse(engine_args.add_cli_args, [*ARGUMENTS, "--additional-config", '{"other": 1}'])
    config = engine_args.from_cli_args(args).additional_config
    assert config == {"other": 1, "elastic": {"gamma": 0.5}}


def test_api_servers_get_them_without_the_plugin(engine_args: Any) -> None:
    """Where there are several, vLLM sends them its arguments, and they read those before any plugin
    is loaded."""
    args = parse(engine_args.add_cli_args, ARGUMENTS)
    expected = engine_args.from_cli_args(args).additional_config
    sent = pickle.loads(pickle.dumps(args))
    stock = engine_args.from_cli_args.__func__.__wrapped__
    assert stock(engine_args, sent).additional_config == expected
    assert engine_args.from_cli_args(args).additional_config == expected, "read once more"


def test_a_parser_from_before_the_plugin(engine_args: Any) -> None:
    stock = engine_args.add_cli_args.__wrapped__
    assert engine_args.from_cli_args(parse(stock, ["--model", MODEL])).model == MODEL


def test_without_flags_nothing_is_added(engine_args: Any) -> None:
    args = parse(engine_args.add_cli_args, ["--model", MODEL])
    assert engine_args.from_cli_args(args).additional_config == {}


def test_the_same_thing_twice_is_refused(engine_args: Any) -> None:
    """One of them would be dropped without a word."""
    twice = [*ARGUMENTS, "--additional-config", '{"elastic": {"reach": 4}}']
    with pytest.raises(ValueError, match="give one of them"):
        engine_args.from_cli_args(parse(engine_args.add_cli_args, twice))


def test_a_flag_without_effect_is_said_at_start(
    engine_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(cli_flags.logger, "warning", lambda text, *args: said.append(text % args))
    engine_args.from_cli_args(parse(engine_args.add_cli_args, ARGUMENTS))
    assert said == [], "nothing that the user did not set"
    some = ["--disable-cascade-attn", "--max-num-seqs", "4", "--mamba-block-size", "8"]
    engine_args.from_cli_args(parse(engine_args.add_cli_args, [*ARGUMENTS, *some]))
    (line,) = said
    assert line.endswith(": --disable-cascade-attn, --mamba-block-size")


def test_adapters_for_an_engine_that_takes_none(engine_args: Any) -> None:
    """The engine's configuration says nothing of them: its first sight is a worker's traceback."""
    for extra in ([], ["--enable-lora"]):
        args = parse(engine_args.add_cli_args, [*ARGUMENTS, *extra])
        args.lora_modules = ["a=/an/adapter"]  # of the server's own parser
        refused = pytest.raises(ValueError, match=r"--lora-modules: .* also give --enable-lora")
        with contextlib.nullcontext() if extra else refused:
            engine_args.from_cli_args(args)


def test_a_path_in_place_of_json(engine_args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(engine_args.add_cli_args, ["--elastic-config", "elastic.json"])
    assert "argument --elastic-config: 'elastic.json' is not JSON" in capsys.readouterr().err


def test_unknown_plugin_is_refused(engine_args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(engine_args.add_cli_args, ["--plugin", "static"])
    assert "'elastic'" in capsys.readouterr().err


def test_patch_is_still_needed(engine_args: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stock = engine_args.add_cli_args.__wrapped__
    try:
        parse(stock, ARGUMENTS)
    except SystemExit:
        assert "unrecognized arguments" in capsys.readouterr().err
        return
    pytest.fail(
        "patch cli_flags can go: stock vLLM takes the flags. Remove patches/cli_flags, its row in "
        "patches/README.md, vllm_elastic/patches/cli_flags.py and this test."
    )
