# SPDX-License-Identifier: Apache-2.0
"""``bench plan``: what fits into the memory of each rank, before there is a rank."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from vllm_elastic.bench.arguments import add_json, positive
from vllm_elastic.bench.dummy_model import BYTES_PER_NUMBER
from vllm_elastic.bench.engine import DEFAULT_ROW_BUDGET
from vllm_elastic.bench.model_config import read_config
from vllm_elastic.bench.rank_memory import (
    GIB,
    RankMemory,
    Setting,
    rank_memory,
    remedies,
)
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import BLOCK_SIZE, ConfigError, ElasticConfig

LLADA_8B = "llada-8b"
LLADA_V = "llada-v"

DESCRIPTION = """\
How much of a rank's memory a model's weights take, how much a step and CUDA graphs, and how many
canvases fit in the rest, for every family that is served. It is arithmetic; nothing of it was
measured on a GPU.

  left = memory * gpu-memory-utilization - weights - step - graphs
  step = saved rows * layers * (d_model / ranks) * b           kept for attention statistics
         + max-num-seqs * canvas * layers * 4                  their totals
         + the largest of
             rows * (3 * d_model + (d_model + 3 * mlp) / ranks) * b      a layer
             rows * d_model * b + 2^25 * (2 * b + 8)                     candidates
             2^26 * 16                                                   attention statistics
  graphs = graph rows * ((3 * d_model + 3 * mlp) * b + 8)       with one rank; else 0,
                                                               unless you name cudagraph_mode
         + 256 * layers / attention_stride * d_model * b       with --whole-passes

with b bytes a number, rows the row budget, graph rows the same but at most 512 or
--max-cudagraph-capture-size, and saved rows 4 * max-window (or canvas, if that is less), or 2 *
max-num-seqs * window if that is more, of which the row budget is the most. Weights of the layers'
products may have --weight-bits of their own. Long canvases, worked on
in chunks of the row budget, and several ranks take somewhat more. It is what a trial run at start
allocates, by which vLLM sizes the cache. Not counted is what CUDA takes, for itself and for each
graph, and what NCCL and attention kernels take; it comes out of what is left, so leave some. With
experts, those that a row takes stand for the MLP: each makes max(2 * mlp / ranks, d_model) + mlp /
ranks numbers of it.

The weights of a model that takes images are counted with its tower and projector, whole on every
rank; of a position it keeps the input of layer 0 too.
Exit status: 0 if a canvas fits for one of the --tp values, 1 if for none, 2 for a bad value.
"""

Fail = Callable[[str], NoReturn]


def add_parser(commands: Any) -> None:
    """Add ``plan`` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="what fits: weights, a step and canvases in the memory of each rank",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_CONFIG",
        help=f"a checkpoint's directory, a config.json, {LLADA_8B} or {LLADA_V}",
    )
    # The second names are those of `vllm serve`.
    parser.add_argument(
        "--tp",
        "--tensor-parallel-size",
        nargs="+",
        type=positive,
        default=[1],
        metavar="N",
        help="ranks that share the model; a row of the table for each number (default: 1)",
    )
    parser.add_argument(
        "--memory", required=True, type=_memory, metavar="GIB", help="of one rank's device"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=_share,
        default=0.9,
        metavar="X",
        help="share of it that vLLM may use (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=list(BYTES_PER_NUMBER), default="bfloat16")
    parser.add_argument(
        "--weight-bits",
        type=_bits,
        default=None,
        metavar="N",
        help="of a quantised checkpoint's weights with their scales: 8 for FP8 and INT8, some 4.2 "
        "for GPTQ and AWQ by groups of 128 (default: those of --dtype)",
    )
    parser.add_argument(
        "--hidden-stride",
        type=positive,
        default=ElasticConfig().hidden_stride,
        metavar="S",
        help="the knob hidden_stride (default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=positive,
        default=ElasticConfig().window,
        metavar="N",
        help="the knob window (default: %(default)s)",
    )
    parser.add_argument(
        "--max-window",
        type=positive,
        default=ElasticConfig().max_window,
        metavar="N",
        help="the knob max_window (default: %(default)s)",
    )
    parser.add_argument(
        "--canvas",
        "--max-model-len",
        type=positive,
        default=None,
        metavar="T",
        help="positions of a canvas, prompt and answer (default: what the model was made for)",
    )
    parser.add_argument(
        "--row-budget",
        "--max-num-batched-tokens",
        type=positive,
        default=DEFAULT_ROW_BUDGET,
        metavar="N",
        help="rows of a step (default: %(default)s)",
    )
    parser.add_argument(
        "--max-num-seqs",
        type=positive,
        default=256,
        metavar="N",
        help="requests at a time (default: %(default)s; vLLM's own default depends on the device)",
    )
    parser.add_argument(
        "--max-cudagraph-capture-size",
        type=positive,
        default=None,
        metavar="N",
        help="the most rows that a CUDA graph works on (default: 512)",
    )
    parser.add_argument("--enforce-eager", action="store_true", help="no CUDA graphs; so on CPUs")
    parser.add_argument(
        "--whole-passes",
        action="store_true",
        help="graphs of whole passes too (--compilation-config with a FULL cudagraph_mode)",
    )
    add_json(parser)
    parser.set_defaults(function=partial(main, fail=parser.error))


def _memory(text: str) -> int:
    """Bytes of so many GiB."""
    number = _number(text)
    if not 0 < number <= 1 << 20:  # false for NaN too
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got {text!r}")
    return int(number * GIB)


def _bits(text: str) -> float:
    number = _number(text)
    if not 1 <= number <= 32:
        raise argparse.ArgumentTypeError(f"must be from 1 to 32 bits, got {text!r}")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text!r}")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def main(args: argparse.Namespace, fail: Fail) -> None:
    """Print a row for each number of ranks, and what to change where no canvas fits.

    Args:
        fail: ends the command with a usage message, as argparse does.

    Raises:
        SystemExit: 1, a full canvas fits for none of the numbers of ranks; 2, a bad value.
    """
    settings, shareable = _settings(args, fail)
    found = [rank_memory(setting) for setting in settings]
    advice = [
        None if each.canvases else remedies(setting, shareable)
        for setting, each in zip(settings, found, strict=True)
    ]
    setting = settings[0]
    print(
        f"{args.dtype}, hidden_stride {setting.hidden_stride}, {_available(setting)}; "
        "an estimate, nothing was run.\n"
    )
    print(
        "| ranks | weights, GiB | step, GiB | graphs, GiB | left, GiB | bytes a position | "
        f"positions | canvases of {setting.canvas:,} |"
    )
    print("|---" * 8 + "|")
    for each in found:
        print(
            f"| {each.ranks} | {each.weights / GIB:.3g} | {each.step / GIB:.3g} | "
            f"{each.graphs / GIB:.2g} | {each.left / GIB:.3g} | {each.position:,} | "
            f"{each.positions:,} | {each.canvases:,} |"
        )
    for each, changes in zip(found, advice, strict=True):
        if changes:
            print(f"\n{_shortage(each, setting)} One of these is enough: {', '.join(changes)}.")
    if args.json is not None:
        rows = [
            asdict(each) | {"position": each.position, "remedies": changes}
            for each, changes in zip(found, advice, strict=True)
        ]
        asked = {k: v for k, v in asdict(setting).items() if k not in ("shape", "ranks")}
        document = {"model": args.model, "dtype": args.dtype, **asked, "ranks": rows}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if all(advice):
        raise SystemExit(1)


def _available(setting: Setting) -> str:
    return f"{setting.utilization:g} of {setting.memory / GIB:g} GiB"


def _shortage(each: RankMemory, setting: Setting) -> str:
    what = f"{each.ranks} rank{'s' * (each.ranks > 1)}: no canvas of {setting.canvas:,} fits;"
    if each.left < 0:
        excess = f"{-each.left / GIB:.3g} GiB more than {_available(setting)}"
        return f"{what} weights, step and graphs take {excess}."
    needed = setting.canvas * each.position / GIB
    return f"{what} it takes {needed:.3g} GiB and {each.left / GIB:.3g} GiB are left."


def _read_model(name: str, fail: Fail) -> Any:
    """The configuration, of any family; LLaDA-8B's sizes are the defaults of its class."""
    from vllm_elastic.models.llada_config import LLaDAConfig
    from vllm_elastic.models.llada_v_config import LLaDAVConfig

    path = Path(name)
    released = {LLADA_8B: LLaDAConfig, LLADA_V: LLaDAVConfig}
    if name in released and not path.exists():
        return released[name]()
    try:
        return read_config(path)
    except FileNotFoundError:
        fail(
            f"argument --model: there is no file {path}; give the directory of a checkpoint, a "
            f"config.json, {LLADA_8B} or {LLADA_V}"
        )
    except ValueError as error:
        fail(f"argument --model: {error}")


def _settings(args: argparse.Namespace, fail: Fail) -> tuple[list[Setting], Callable[[int], bool]]:
    """One setting for each number of ranks, and which numbers of ranks can share the model.

    What start-up would refuse is refused here.
    """
    config = _read_model(args.model, fail)
    # Imports vLLM, which takes seconds: not before the model is understood.
    from vllm_elastic.engine.optimisations import MOST_ROWS_OF_A_WHOLE_PASS, most_rows
    from vllm_elastic.models.rows import bucket
    from vllm_elastic.models.shares import undivided_by

    def shareable(ranks: int) -> bool:
        return not undivided_by(config, ranks)

    even = [ranks for ranks in range(1, config.num_attention_heads + 1) if shareable(ranks)]
    for ranks in args.tp:
        if what := undivided_by(config, ranks):
            fail(
                f"argument --tp: {ranks} ranks cannot share {what} evenly; "
                f"use {', '.join(map(str, even))}"
            )
    try:
        ElasticConfig.from_dict({"hidden_stride": args.hidden_stride})
        ElasticConfig.from_dict({"window": args.window, "max_window": args.max_window})
    except ConfigError as error:
        fail(str(error))
    if 1 < args.hidden_stride >= config.num_hidden_layers:
        fail(
            f"argument --hidden-stride: {args.hidden_stride} stores no hidden state of a model of "
            f"{config.num_hidden_layers} layers; lower it to at most {config.num_hidden_layers - 1}"
        )
    canvas = args.canvas or config.max_position_embeddings
    if canvas > config.max_position_embeddings:
        fail(
            f"argument --canvas: {canvas} positions, but the model was made for "
            f"{config.max_position_embeddings}; lower it"
        )
    if args.row_budget < args.max_num_seqs:
        fail(
            f"argument --row-budget: {args.row_budget} rows are fewer than the {args.max_num_seqs} "
            "requests of --max-num-seqs, which vLLM refuses; raise it or lower the other"
        )
    graph_rows = bucket(most_rows(args.max_cudagraph_capture_size, args.row_budget))
    graph_rows = 0 if args.enforce_eager else graph_rows
    base = Setting(
        shape=ModelShape.of(config, BYTES_PER_NUMBER[args.dtype]),
        ranks=1,
        memory=args.memory,
        utilization=args.gpu_memory_utilization,
        hidden_stride=args.hidden_stride,
        canvas=canvas,
        row_budget=args.row_budget,
        seats=args.max_num_seqs,
        window=args.window,
        max_window=args.max_window,
        block_size=BLOCK_SIZE,
        graph_rows=graph_rows,
        whole_rows=min(graph_rows, MOST_ROWS_OF_A_WHOLE_PASS) if args.whole_passes else 0,
        weight_bits=args.weight_bits,
    )
    return [replace(base, ranks=ranks) for ranks in args.tp], shareable
