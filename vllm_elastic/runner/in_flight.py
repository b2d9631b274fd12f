# SPDX-License-Identifier: Apache-2.0
"""A pass that the device may still be working on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from vllm_elastic.decoding.measurement import Measured
from vllm_elastic.decoding.plan import Logprobs, PassPlan, PassResult
from vllm_elastic.runner.download import Download, Fetched
from vllm_elastic.runner.head import Candidates


@dataclass
class ElasticRunnerOutput(ModelRunnerOutput):
    """vLLM's output with each request's pass result; tokens are the scheduler's to commit."""

    pass_results: list[PassResult] = field(default_factory=list)

    @classmethod
    def of(cls, plans: Sequence[PassPlan], results: list[PassResult]) -> ElasticRunnerOutput:
        req_ids = [plan.request_id for plan in plans]
        return cls(
            req_ids=req_ids,
            req_id_to_index={req_id: i for i, req_id in enumerate(req_ids)},
            sampled_token_ids=[[] for _ in plans],
            pass_results=results,
        )


class PassInFlight(AsyncModelRunnerOutput):
    """All of a pass is queued; nothing of it has been waited for.

    Args:
        slices: each plan's window rows among the candidates.
        measured: by the plan's index; belongs to ``download``, as the candidates will.
        faults: why a plan's result is of no use, by its index.
    """

    def __init__(
        self,
        plans: Sequence[PassPlan],
        slices: Sequence[slice],
        candidates: Candidates,
        measured: dict[int, Fetched[Measured]],
        download: Download,
        faults: dict[int, str],
    ) -> None:
        self._plans, self._slices, self._measured = plans, slices, measured
        self._faults = faults
        self._logprobs = {
            index: download.of(Logprobs, *parts) for index, parts in candidates.logprobs.items()
        }
        self._candidates = download.of(
            _arrays, candidates.token_ids, candidates.probabilities, candidates.entropies
        )
        download.send()

    def results(self) -> list[PassResult]:
        """The results of the plans, in order. Waits for the device, from any thread."""
        token_ids, probabilities, entropies = self._candidates.get()
        return [
            PassResult(
                token_ids[rows],
                probabilities[rows],
                entropies=None if entropies is None else entropies[rows],
                logprobs=self._logprobs[i].get() if i in self._logprobs else None,
                measured=self._measured[i].get() if i in self._measured else None,
                fault=self._faults.get(i),
            )
            for i, rows in enumerate(self._slices)
        ]

    def get_output(self) -> ElasticRunnerOutput:
        """vLLM asks once, when it has nothing else to do."""
        return ElasticRunnerOutput.of(self._plans, self.results())

    def get_kv_connector_output(self) -> None:
        """vLLM 0.33 asks where ``get_output`` failed: there is no connector."""
        return None


def _arrays(
    token_ids: np.ndarray, probabilities: np.ndarray, entropies: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    return token_ids, probabilities, entropies
