# SPDX-License-Identifier: Apache-2.0
"""`make report`: the demo's three problems under its four settings, as a page that replays them.

python examples/report.py [--model DIR] [--out FILE.html]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from demo import CANVAS, KV_CACHE_BYTES, SEED, SETTINGS, TASKS, TINY_LLADA, output_to
from tasks import problems

from vllm_elastic.bench.report import page


def decode(model: str) -> list[dict[str, Any]]:
    """Records of all problems under each setting."""
    from vllm_elastic.bench.engine import BenchEngine

    engine = BenchEngine(model, kv_cache_memory_bytes=KV_CACHE_BYTES, canvas=True)
    template = engine.llm.get_tokenizer().apply_chat_template
    requests = [
        {
            "id": problem.task,
            "prompt": template(problem.messages(), tokenize=False, add_generation_prompt=True),
            "max_tokens": CANVAS,
        }
        for task in TASKS
        for problem in problems(task, SEED, 1)
    ]
    engine.run(requests)  # warm up
    records = []
    for setting, knobs in SETTINGS.items():
        own = {f"elastic_{knob}": value for knob, value in knobs.items()}
        results = engine.run([{**request, **own} for request in requests])
        records += [{"setting": setting, **result} for result in results]
    return records


def main() -> None:
    """Decode, write the records, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.relpath(TINY_LLADA))
    parser.add_argument("--out", type=Path, default=Path("out/report.html"))
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

    log = Path(tempfile.mkdtemp(prefix="elastic-report-")) / "engine.log"
    print(f"decoding {len(TASKS)} problems under {len(SETTINGS)} settings ...", flush=True)
    print(f"  log: {log}", flush=True)
    with output_to(log):
        records = decode(args.model)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    args.out.with_suffix(".jsonl").write_text("".join(lines))
    args.out.write_text(page(records))
    print(f"{args.out}: open it in a browser; the records are in {args.out.with_suffix('.jsonl')}")


if __name__ == "__main__":
    main()
