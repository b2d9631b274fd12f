# SPDX-License-Identifier: Apache-2.0
"""How the runner runs passes: found out at start, sent to workers in vLLM's configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

RUNNER_OPTIONS = "elastic_runner"
"""Where vLLM's ``additional_config`` has the ``RunnerOptions``."""


class RunnerOptions(NamedTuple):
    """A tuple, as vLLM hashes its ``additional_config`` as JSON.

    Attributes:
        graph_rows: numbers of rows that graphs of layers are for, ascending; none: no graphs.
        whole_pass_rows: those of them that graphs of whole passes are for, too.
        compiles: whether layers are compiled.
    """

    graph_rows: list[int]
    whole_pass_rows: list[int]
    compiles: bool

    @staticmethod
    def of_engine(vllm_config: Any) -> RunnerOptions:
        """The options of an engine of this ``VllmConfig``."""
        options: RunnerOptions = vllm_config.additional_config[RUNNER_OPTIONS]
        return options
