# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_elastic.watch --server URL``: a page on which a running server is watched."""

from __future__ import annotations

import argparse
import os

from vllm_elastic.watch.page_server import PageServer


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_elastic.watch",
        description="A page that asks a running `vllm serve` the same question under two settings "
        "and shows both answers as they are filled in, pass by pass.",
    )
    parser.add_argument(
        "--server",
        type=_url,
        default="http://localhost:8000",
        metavar="URL",
        help="a `vllm serve` with this plugin (default: %(default)s)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("VLLM_API_KEY"),
        help="of the server (default: $VLLM_API_KEY); it stays here, the page does not get it",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="where the page listens (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=_port, default=8080, metavar="N", help="of the page (default: %(default)s)"
    )
    return parser


def _url(text: str) -> str:
    if not text.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"must begin with http:// or https://, got {text!r}")
    return text


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 65535, got {text!r}")
    return int(text)


def main() -> None:
    """Serve the page until interrupted."""
    args = make_parser().parse_args()
    try:
        server = PageServer((args.host, args.port), args.server, args.api_key)
    except OSError as error:
        raise SystemExit(
            f"watch: cannot listen on {args.host}:{args.port}: {error}; name another --port"
        ) from None
    with server:
        print(f"{server.url} shows {args.server}; Ctrl-C ends it", flush=True)
        if trouble := server.trouble():
            print(f"watch: {args.server} does not answer yet: {trouble}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
