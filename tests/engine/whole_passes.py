# SPDX-License-Identifier: Apache-2.0
"""Whole passes' graphs for an engine that was started without them."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from tests.device import ON_CARD
from vllm_elastic.runner.graphed_pass import AllQueries, GraphedPasses, PassInputs

from .plain_attention import plain_attention


def attention(runner: Any) -> AbstractContextManager[None]:
    """That which a graph may have in it: a card's own."""
    return contextlib.nullcontext() if ON_CARD else plain_attention(runner)


def uncaptured(runner: Any, most_rows: int, most_requests: int) -> GraphedPasses:
    """That read all layers' queries, of canvases as long as the engine serves."""
    width = runner.cache.table_width(runner.model_config.max_model_len)
    inputs = PassInputs(runner.device, most_rows, most_requests, width)
    queries = AllQueries(runner.model, most_rows, range(runner.traits.num_layers))
    return GraphedPasses(runner.model, inputs, queries)
