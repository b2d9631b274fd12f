# SPDX-License-Identifier: Apache-2.0
"""``--plugin elastic`` and ``--elastic-config JSON`` on vLLM's command line."""

from __future__ import annotations

import argparse
import functools
from typing import Any

from vllm.logger import init_logger

from vllm_elastic.config import knobs_of
from vllm_elastic.engine.flag_rules import without_effect

logger = init_logger("vllm.vllm_elastic.cli_flags")

_WRAPPED = "_vllm_elastic_wrapped"


def add_elastic_flags() -> None:
    """Wrap ``EngineArgs`` so that the flags end up in ``additional_config["elastic"]``, once.

    See patches/cli_flags.
    """
    from vllm.engine.arg_utils import EngineArgs

    if hasattr(EngineArgs.add_cli_args, _WRAPPED):
        return
    add_cli_args, from_cli_args = EngineArgs.add_cli_args, EngineArgs.from_cli_args.__func__
    ignored = without_effect()
    defaults: dict[str, Any] = {}

    @functools.wraps(add_cli_args)
    def with_flags(parser: Any) -> Any:
        parser = add_cli_args(parser)
        defaults.update({name: parser.get_default(name) for name in ignored})
        group = parser.add_argument_group(
            "Elastic", "Decoding of masked diffusion models by vllm_elastic."
        )
        group.add_argument(
            "--plugin",
            choices=["elastic"],
            default=None,
            help="Name the plugin that serves LLaDA, Dream and others (it is active without this "
            "flag too).",
        )
        group.add_argument(
            "--elastic-config",
            type=knobs_of,
            default=None,
            metavar="JSON",
            help='Decoding knobs, for instance \'{"preset": "published", "gamma": 0.8}\'.',
        )
        return parser

    @functools.wraps(from_cli_args)
    def with_config(cls: type[EngineArgs], args: argparse.Namespace) -> EngineArgs:
        engine_args = from_cli_args(cls, args)
        given = [
            flag
            for name, flag in ignored.items()
            # A parser that was made before the plugin was loaded has told no defaults.
            if name in defaults and getattr(args, name, None) != defaults[name]
        ]
        named = getattr(args, "plugin", None)
        # No part of the engine's configuration, so a worker would be the first to say so.
        if named and getattr(args, "lora_modules", None) and not args.enable_lora:
            raise ValueError(
                "--lora-modules: the engine takes no adapters; also give --enable-lora "
                "(vllm_elastic)."
            )
        if given and named:
            logger.warning(
                "no effect with a masked diffusion model, see docs/flags.md of vllm_elastic: %s",
                ", ".join(given),
            )
        values = getattr(args, "elastic_config", None)
        if values is not None:
            if "elastic" in engine_args.additional_config:
                raise ValueError(
                    "--elastic-config and --additional-config's 'elastic' are the same thing: "
                    "give one of them."
                )
            engine_args.additional_config = {**engine_args.additional_config, "elastic": values}
            # Several API servers are given these arguments, and read them before any plugin is
            # loaded there: what is vLLM's own reaches them.
            args.additional_config, args.elastic_config = engine_args.additional_config, None
        return engine_args

    setattr(with_flags, _WRAPPED, True)
    EngineArgs.add_cli_args = staticmethod(with_flags)
    EngineArgs.from_cli_args = classmethod(with_config)
