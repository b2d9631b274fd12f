# SPDX-License-Identifier: Apache-2.0
"""What the engine core sends beside a request's tokens: each kind to its reader, none to vLLM.

See patches/reports: an output has no place for what another scheduler has to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.output_processor import OutputProcessor, RequestState
from vllm.v1.metrics.stats import IterationStats

from vllm_elastic.engine.attachments import ENDED, PASSES, SPAN, detach
from vllm_elastic.patches.ended_requests import take_end_token
from vllm_elastic.patches.traced_requests import keep_attributes
from vllm_elastic.patches.watched_requests import show_passes
from vllm_elastic.patches.wrapping import wrap_once

Reader = Callable[[RequestState, Any, EngineCoreOutput, IterationStats | None], None]
"""Called before vLLM looks at the output, with the request that it is of and what is reported."""

_READERS: Mapping[str, Reader] = {
    ENDED: take_end_token,
    SPAN: keep_attributes,
    PASSES: show_passes,
}


def read_reports() -> None:
    """Wrap the front end's output processing, once. Other models' outputs carry no report."""
    wrap_once(OutputProcessor, "process_outputs", _process)


def _process(
    process_outputs: Callable[..., Any],
    self: OutputProcessor,
    engine_core_outputs: list[EngineCoreOutput],
    engine_core_timestamp: float | None = None,
    iteration_stats: IterationStats | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    outputs = [
        output
        for output in engine_core_outputs
        if not _read(self, output, iteration_stats) or _says_more(output)
    ]
    return process_outputs(self, outputs, engine_core_timestamp, iteration_stats, *args, **kwargs)


def _read(
    processor: OutputProcessor, output: EngineCoreOutput, iteration: IterationStats | None
) -> bool:
    """Whether there was a report. Of a request that the front end has ended it reaches nobody."""
    if not output.kv_transfer_params:
        return False
    state = processor.request_states.get(output.request_id)
    found = False
    for key, reader in _READERS.items():
        output.kv_transfer_params, value = detach(output.kv_transfer_params, key)
        if value is None:
            continue
        found = True
        if state is not None:
            reader(state, value, output, iteration)
    return found


def _says_more(output: EngineCoreOutput) -> bool:
    """vLLM would stream an output that was made for its report, and time a first token by it."""
    return bool(output.new_token_ids) or output.finish_reason is not None
