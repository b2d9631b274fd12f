# SPDX-License-Identifier: Apache-2.0
"""A config.json is read by what it says under ``architectures``, not under ``model_type``.

Three families say ``model_type: llada`` and have different keys; of one the model type is not
known. All other models go the stock way.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import huggingface_hub
from transformers import PretrainedConfig
from vllm.transformers_utils import config as vllm_configs
from vllm.transformers_utils.config import HFConfigParser

from vllm_elastic.models.registry import FAMILIES


class ConfigByArchitecture(HFConfigParser):
    """vLLM's parser of config.json, but for the ``FAMILIES``: their own classes, no remote code.

    ``--hf-overrides '{"architectures": [...]}'`` counts, so that a file which names another
    architecture, or none, can be read as a family's.
    """

    def parse(
        self,
        model: str | Path,
        trust_remote_code: bool,
        revision: str | None = None,
        code_revision: str | None = None,
        **kwargs: Any,
    ) -> tuple[dict[str, Any], PretrainedConfig]:
        """As in vLLM: the file's keys, and the configuration made of them.

        Raises:
            ValueError: a key that the family needs is missing, or one that it does not compute.
        """
        raw, _ = PretrainedConfig.get_config_dict(
            model,
            revision=revision,
            token=kwargs.get("token"),
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
        overrides = kwargs.get("hf_overrides")
        named = overrides if isinstance(overrides, dict) else {}
        architectures = named.get("architectures") or raw.get("architectures") or [None]
        family = FAMILIES.get(architectures[0])
        if family is None:
            return super().parse(model, trust_remote_code, revision, code_revision, **kwargs)
        config = resolve_name(family.config).from_dict(raw, name_or_path=str(model))
        return raw, config


def dispatch_on_architectures() -> None:
    """Put the parser in the place of vLLM's own for config.json; once is as good as twice."""
    # What `register_config_parser` does, without its warning in every process that it replaces one.
    vllm_configs._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = ConfigByArchitecture
