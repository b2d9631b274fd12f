# SPDX-License-Identifier: Apache-2.0
"""`make demo-ui`: serve the tiny model, and a page that watches it answer.

python examples/demo_ui.py [--model DIR] [--port N]
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from demo import KV_CACHE_BYTES, SEED, TASKS, TINY_LLADA
from tasks import problems

from vllm_elastic.bench.server import ServerProcess
from vllm_elastic.watch.page_server import PageServer


def main() -> None:
    """Start both, and end both on Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=os.path.relpath(TINY_LLADA))
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="of the page")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is ended too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    log = Path(tempfile.mkdtemp(prefix="elastic-demo-")) / "server.log"
    options = ["--dtype", "float32", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
    server = ServerProcess(args.model, options, log=log)
    print(f"$ {server.command_line}\n  log: {log}\n  starting ...", flush=True)
    questions = [problem.question for task in TASKS for problem in problems(task, SEED, 1)]
    try:
        with server, PageServer(("127.0.0.1", args.port), server.url, questions=questions) as page:
            print(f"open {page.url} in a browser; Ctrl-C ends both", flush=True)
            page.serve_forever()
    except KeyboardInterrupt:
        print()
    except (RuntimeError, OSError) as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
