# SPDX-License-Identifier: Apache-2.0
"""An engine of a checkpoint, with room for the requests of a command.

A model's own length can take more memory than there is, and prompts hardly ever come near it.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_elastic.bench.engine import BenchEngine, cache_bytes, has_tokenizer
from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import ElasticConfig


def served_model(
    args: Namespace,
    requests: Sequence[Mapping[str, Any]],
    batch_size: int | None = None,
    **options: Any,
) -> BenchEngine:
    """An engine as ``arguments.add_engine`` was told.

    Args:
        requests: that it will serve, as ``BenchEngine.run`` has them.
        batch_size: of them at a time; None: ``--batch-size``.
        options: of ``BenchEngine``.

    Raises:
        SystemExit: a prompt is text and the checkpoint has no tokenizer.
    """
    knobs = ElasticConfig.from_dict(args.elastic_config)
    model = _model_config(args.model, args.dtype)
    seats = batch_size or args.batch_size
    longest = longest_canvas(model, requests, knobs.default_max_tokens)
    canvas = args.max_model_len or min(longest, model.max_model_len)
    cache = args.kv_cache_memory_bytes or cache_bytes(
        ModelShape.of(model.hf_config, model.dtype.itemsize),
        canvas,
        min(seats, len(requests)),
        knobs.hidden_stride,
    )
    return BenchEngine(
        args.model,
        dtype=args.dtype,
        batch_size=seats,
        elastic_config=args.elastic_config,
        max_model_len=canvas,
        kv_cache_memory_bytes=cache,
        **options,
    )


def longest_canvas(
    model: Any, requests: Sequence[Mapping[str, Any]], default_max_tokens: int
) -> int:
    """Positions of the longest canvas, and at least what a start asks for: a token and its answer.

    Args:
        model: vLLM's ``ModelConfig``.
        default_max_tokens: of a request that names none.

    Raises:
        SystemExit: a prompt is text and the checkpoint has no tokenizer.
    """
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model)

    def prompt_tokens(request: Mapping[str, Any]) -> int:
        if "prompt_token_ids" in request:
            return len(request["prompt_token_ids"])
        if tokenizer is None:
            raise SystemExit(
                f"--model: {model.model} has no tokenizer.json: write prompts as prompt_token_ids"
            )
        return len(tokenizer.encode(request["prompt"]))

    canvases = [
        prompt_tokens(request) + (request.get("max_tokens") or default_max_tokens)
        for request in requests
    ]
    return max([default_max_tokens + 1, *canvases])


def _model_config(model: Path, dtype: str) -> Any:
    """What vLLM makes of the config.json: the type of numbers, the length, the sizes."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(model=str(model), dtype=dtype, skip_tokenizer_init=not has_tokenizer(model))
    return args.create_model_config()
