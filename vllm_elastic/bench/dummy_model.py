# SPDX-License-Identifier: Apache-2.0
"""An engine of a LLaDA of any size with random weights: what a pass takes does not depend on them.

The sizes' defaults are LLaDA-8B's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from vllm_elastic.bench.arguments import positive
from vllm_elastic.bench.engine import DEFAULT_ROW_BUDGET, BenchEngine, cache_bytes
from vllm_elastic.bench.simulation.model_shape import ModelShape

BYTES_PER_NUMBER = {"bfloat16": 2, "float32": 4}

WHOLE_PASSES = {"cudagraph_mode": "FULL_AND_PIECEWISE"}
"""vLLM's ``--compilation-config`` for graphs of whole passes (``engine.optimisations``)."""


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """``--width``, ``--layers``, ``--heads``, ``--mlp``, ``--vocabulary``, ``--dtype``, and how the
    engine runs it."""
    shape = ModelShape()
    sizes = parser.add_argument_group("model (default: LLaDA-8B's sizes)")
    sizes.add_argument("--width", type=positive, default=shape.width, help="d_model")
    sizes.add_argument("--layers", type=positive, default=shape.layers)
    sizes.add_argument("--heads", type=positive, default=shape.heads)
    sizes.add_argument("--mlp", type=positive, default=shape.mlp, help="mlp_hidden_size")
    sizes.add_argument("--vocabulary", type=positive, default=shape.vocabulary)
    sizes.add_argument("--dtype", choices=list(BYTES_PER_NUMBER), default="bfloat16")
    sizes.add_argument(
        "--max-num-batched-tokens",
        type=positive,
        default=DEFAULT_ROW_BUDGET,
        metavar="N",
        help="row budget of a step (default: %(default)s)",
    )
    sizes.add_argument(
        "--whole-passes",
        action="store_true",
        help="on a GPU: passes whose rows all join at layer 0 are one CUDA graph each",
    )


def shape_of_sizes(args: argparse.Namespace) -> ModelShape:
    """What ``add_sizes`` was given."""
    return ModelShape(
        width=args.width,
        layers=args.layers,
        heads=args.heads,
        kv_heads=args.heads,
        mlp=args.mlp,
        vocabulary=args.vocabulary,
        bytes_per_number=BYTES_PER_NUMBER[args.dtype],
    )


def dummy_engine(
    shape: ModelShape, args: argparse.Namespace, batch_sizes: Sequence[int], canvas: int
) -> BenchEngine:
    """An engine that serves the largest batch, of canvases of so many positions."""
    seats = max(batch_sizes)
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": shape.width,
        "n_heads": shape.heads,
        "n_layers": shape.layers,
        "mlp_hidden_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "max_sequence_length": canvas,
        "mask_token_id": shape.vocabulary - 1,
        "eos_token_id": shape.vocabulary - 2,
        "torch_dtype": args.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return BenchEngine(
            folder,
            dtype=args.dtype,
            batch_size=seats,
            load_format="dummy",
            row_budget=args.max_num_batched_tokens,
            kv_cache_memory_bytes=cache_bytes(shape, canvas, seats),
            compilation_config=WHOLE_PASSES if args.whole_passes else None,
        )
