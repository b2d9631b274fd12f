# SPDX-License-Identifier: Apache-2.0
"""A LLaDA-V on two ranks: tower and language model shared, the oracle's tokens. float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engines_kept import end_ranks
from tests.tiny_llada_v import TinyLLaDAV

from .test_images import CONFIGS, Tiny, problems
from .test_tensor_parallel import start

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(600)]


def test_two_ranks_equal_oracle(tmp_path: Path) -> None:
    model = TinyLLaDAV()
    model.save(tmp_path)
    served = start(model.oracle, tmp_path, "llada-v", "mp")
    try:
        one, _, two, *_ = problems()
        cases = [(problem, name) for problem in (one, two) for name in ("none", "block")]
        cases.append((one, "released-low"))
        requests = [problem.request(CONFIGS[name]) for problem, name in cases]
        results = served.engine.run(requests)  # type: ignore[attr-defined]
        Tiny(model, served.engine, tmp_path).compare(cases, results)
    finally:
        end_ranks(served.engine)
