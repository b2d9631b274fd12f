# SPDX-License-Identifier: Apache-2.0
"""Models of a released config.json's width: few layers, dummy weights, bfloat16, gigabytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.engines_kept import let_go


@contextmanager
def full_width(folder: Path, config: Mapping[str, Any], **options: Any) -> Iterator[Any]:
    """A ``BenchEngine`` of this config.json, written into the folder; its memory is freed."""
    from vllm_elastic.bench.engine import BenchEngine

    (folder / "config.json").write_text(json.dumps(config))
    engine = BenchEngine(folder, dtype="auto", load_format="dummy", **options)
    try:
        found = engine.llm.llm_engine.vllm_config.model_config
        assert not found.trust_remote_code
        assert str(found.dtype) == "torch.bfloat16"
        yield engine
    finally:
        let_go(engine)
