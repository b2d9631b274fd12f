# SPDX-License-Identifier: Apache-2.0
"""What `vllm serve` would make of a command line that an example or a page shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def parse_as_vllm_serve(words: Sequence[str]) -> Any:
    """With the plugin's flags; abbreviated and unknown ones end in ``SystemExit``."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_elastic.plugin import register

    register()
    return make_arg_parser(FlexibleArgumentParser(allow_abbrev=False)).parse_args(list(words))
