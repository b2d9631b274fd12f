# SPDX-License-Identifier: Apache-2.0
"""The real engine in this process, with every request's record at hand."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from tqdm import tqdm

from vllm_elastic.bench.simulation.model_shape import ModelShape
from vllm_elastic.config import BLOCK_SIZE, REQUEST_PREFIX, ElasticConfig
from vllm_elastic.decoding.record import DecodingRecord

DEFAULT_ROW_BUDGET = 8192
DEFAULT_KV_CACHE_BYTES = 1 << 30
"""Where nobody says how many canvases there are, and the least where somebody does."""


def on_gpu() -> bool:
    """Whether vLLM works on a GPU, where it takes a share of the memory for its cache."""
    import torch

    return bool(torch.cuda.is_available())


def cache_bytes(shape: ModelShape, canvas: int, seats: int, hidden_stride: int = 1) -> int | None:
    """Bytes of a KV cache that holds so many canvases of so many positions.

    None on a GPU: vLLM sizes it there, as it does for a server.
    """
    if on_gpu():
        return None
    blocks = seats * -(-canvas // BLOCK_SIZE) + 1  # vLLM keeps one for itself
    position = shape.keys_values_bytes() + shape.hidden_bytes(hidden_stride)
    return max(DEFAULT_KV_CACHE_BYTES, blocks * BLOCK_SIZE * position)


def has_tokenizer(model: str | Path) -> bool:
    """Whether a checkpoint can be asked in words."""
    return (Path(model) / "tokenizer.json").exists()


def progress_bar(label: str) -> Callable[..., tqdm] | bool:
    """What vLLM is to call for its bar: one with this label, gone when it is full.

    False where nobody looks: vLLM divides by the time of a bar that is switched off.
    """

    def bar(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **{**kwargs, "desc": label, "leave": False})

    return bar if sys.stderr.isatty() else False


class BenchEngine:
    """vLLM's ``LLM`` with the scheduler in reach; at most ``batch_size`` requests at a time.

    Args:
        model: directory of a LLaDA.
        elastic_config: engine-wide knobs; requests may override them.
        max_model_len: canvas positions; None: what the model was made for.
        row_budget: max_num_batched_tokens.
        similarities: keep every drift test's similarities in the records.
        rows: keep the rows of each join layer in the records.
        canvas: keep what ``bench report`` shows in the records.
        adapter: directory of a LoRA adapter that requests are for, unless they say otherwise.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        batch_size: int = 1,
        elastic_config: Mapping[str, Any] | None = None,
        max_model_len: int | None = None,
        row_budget: int = DEFAULT_ROW_BUDGET,
        similarities: bool = False,
        rows: bool = False,
        canvas: bool = False,
        adapter: Path | None = None,
        **llm_options: Any,
    ) -> None:
        # The scheduler must live in this process: its records are the result.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        knobs = dict(elastic_config or {}, record=True)
        knobs |= {"record_similarities": similarities, "record_rows": rows, "record_canvas": canvas}
        ElasticConfig.from_dict(knobs)
        self._adapter = None
        if adapter is not None:
            from vllm.lora.request import LoRARequest

            self._adapter = LoRARequest(adapter.name, 1, str(adapter))
            llm_options |= {"enable_lora": True, "max_lora_rank": _slot_rank(adapter)}
        tokenizer = has_tokenizer(model)
        self.llm = LLM(
            model=str(model),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=batch_size,
            max_num_batched_tokens=max(row_budget, batch_size),
            skip_tokenizer_init=not tokenizer,
            additional_config={"elastic": knobs},
            **{
                "kv_cache_memory_bytes": DEFAULT_KV_CACHE_BYTES,
                "disable_log_stats": True,
                **llm_options,
            },
        )
        model_config = self.llm.llm_engine.vllm_config.model_config
        config = model_config.hf_config
        self.dtype = str(model_config.dtype).removeprefix("torch.")
        self.mask_token_id: int = config.mask_token_id
        self.eos_token_id: int | None = config.eos_token_id
        self.num_layers: int = config.num_hidden_layers
        self._has_tokenizer = tokenizer

    @property
    def scheduler(self) -> Any:
        """The ``ElasticScheduler`` in this process."""
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def num_blocks(self) -> int:
        """KV blocks that requests can have: vLLM keeps one for itself."""
        return int(self.scheduler.kv_cache_manager.block_pool.num_gpu_blocks) - 1

    @property
    def runner(self) -> Any:
        """The ``ElasticRunner`` in this process; several ranks have processes of their own."""
        executor = self.llm.llm_engine.engine_core.engine_core.model_executor
        return executor.driver_worker.worker.model_runner

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Serve requests and return one result each, in order.

        Args:
            requests: ``prompt`` or ``prompt_token_ids``; optional ``id``, ``multi_modal_data``
                and ``lora_request`` (vLLM's), ``max_tokens`` (default: the engine's
                ``default_max_tokens``) and ``elastic_*`` knobs.

        Returns:
            id, policy, layers (the model's), canvas (positions), prompt_tokens, token_ids (up to
            and without the first end token), text,
            denoising_steps, passes, row_layers, full_row_layers, steps, seconds; with ``canvas``
            also knobs, prompt_token_ids and words (the text of every token id that occurs).
        """
        from vllm import SamplingParams

        default = self.scheduler.elastic_config.default_max_tokens
        prompts: list[dict[str, Any]] = []
        params = []
        for request in requests:
            if "prompt_token_ids" in request:
                prompts.append({"prompt_token_ids": list(request["prompt_token_ids"])})
            else:
                prompts.append({"prompt": request["prompt"]})
            if "multi_modal_data" in request:
                prompts[-1]["multi_modal_data"] = request["multi_modal_data"]
            knobs = _knobs(request)
            params.append(
                SamplingParams(
                    temperature=0.0,
                    max_tokens=request.get("max_tokens") or default,
                    extra_args=knobs or None,
                    detokenize=self._has_tokenizer,
                    # Without a tokenizer vLLM knows of no end token.
                    stop_token_ids=None if self._has_tokenizer else self._end_token_ids(),
                )
            )
        outputs = self.llm.generate(
            prompts,
            params,
            use_tqdm=progress_bar(_setting(requests)),
            lora_request=[request.get("lora_request", self._adapter) for request in requests],
        )
        return [
            self._result(request, index, output, asked.max_tokens)
            for index, (request, output, asked) in enumerate(
                zip(requests, outputs, params, strict=True)
            )
        ]

    def _end_token_ids(self) -> list[int]:
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def _result(
        self, request: Mapping[str, Any], index: int, output: Any, max_tokens: int
    ) -> dict[str, Any]:
        # vLLM appends a suffix of its own to the ids that requests carry inside.
        (key,) = (k for k in self.scheduler.records if k.split("-")[0] == output.request_id)
        record = self.scheduler.records.pop(key)
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        if token_ids[-1:] == [self.eos_token_id]:  # there without a tokenizer only
            token_ids.pop()
        config = self.scheduler.elastic_config.for_request(request)
        prompt_token_ids = list(output.prompt_token_ids)
        shown: dict[str, Any] = {}
        if config.record_canvas:
            shown = {
                "knobs": asdict(config),
                "prompt_token_ids": prompt_token_ids,
                "words": self._words([*prompt_token_ids, *token_ids], record),
            }
        return {
            "id": request.get("id", index),
            "policy": config.policy,
            "layers": self.num_layers,
            "canvas": len(prompt_token_ids) + max_tokens,
            "prompt_tokens": len(prompt_token_ids),
            "token_ids": token_ids,
            "text": completion.text,
            "denoising_steps": record.denoising_steps,
            "passes": record.passes,
            "row_layers": record.row_layers,
            "full_row_layers": record.full_row_layers,
            "seconds": record.seconds,
            "steps": record.steps,
            **shown,
        }

    def _words(self, shown: Sequence[int], record: DecodingRecord) -> dict[str, str]:
        """Text of these tokens and of all that was predicted, by token id as JSON's keys are."""
        token_ids = set(shown)
        for step in record.steps:
            token_ids |= {token_id for _, token_id, _ in step["canvas"]["predicted"]}
        if not self._has_tokenizer:
            return {str(token_id): f" {token_id}" for token_id in sorted(token_ids)}
        tokenizer = self.llm.get_tokenizer()
        return {str(token_id): tokenizer.decode([token_id]) for token_id in sorted(token_ids)}


def _slot_rank(adapter: Path) -> int:
    """The smallest rank of slots that vLLM has and the adapter fits.

    Raises:
        SystemExit: the folder has no adapter, or one of a rank beyond them.
    """
    from vllm.config.lora import MaxLoRARanks

    path = adapter / "adapter_config.json"
    try:
        rank = int(json.loads(path.read_text())["r"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--adapter: {path}: no adapter as PEFT writes it ({error!r})") from None
    fitting = [size for size in get_args(MaxLoRARanks) if size >= rank]
    if not fitting:
        raise SystemExit(f"--adapter: {path}: rank {rank} is beyond vLLM's slots")
    return int(min(fitting))


def _knobs(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a request says to the plugin, under its full names."""
    return {name: value for name, value in request.items() if name.startswith(REQUEST_PREFIX)}


def _setting(requests: Sequence[Mapping[str, Any]]) -> str:
    """The knobs of the first request, for people: a run's requests have the same ones."""
    knobs = _knobs(requests[0]).items()
    said = ", ".join(f"{name.removeprefix(REQUEST_PREFIX)} {value}" for name, value in knobs)
    return said or "engine's knobs"
