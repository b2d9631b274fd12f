# SPDX-License-Identifier: Apache-2.0
"""What is registered with vLLM, and nothing else. Cheap, idempotent, loaded in every process."""

from __future__ import annotations

from pkgutil import resolve_name

from vllm_elastic.models.registry import FAMILIES, Family


def register() -> None:
    """Entry point of ``vllm.general_plugins``.

    In any order: where two patches wrap one function (``to_sampling_params``), each notes what is
    its own on what the function returned.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        import vllm.model_executor.models  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "vllm_elastic needs vLLM: install vllm-elastic[cpu] or vllm-elastic[cuda]."
        ) from error

    from vllm_elastic.engine.image_renderer import register_renderer
    from vllm_elastic.models.config_parser import dispatch_on_architectures
    from vllm_elastic.patches.admission import check_requests_at_admission
    from vllm_elastic.patches.cli_flags import add_elastic_flags
    from vllm_elastic.patches.ended_requests import account_for_ended_requests
    from vllm_elastic.patches.max_tokens import take_max_tokens_literally
    from vllm_elastic.patches.reports import read_reports
    from vllm_elastic.patches.sent_parameters import note_what_was_sent
    from vllm_elastic.patches.traced_requests import trace_denoising
    from vllm_elastic.patches.watched_requests import show_passes_of_watched_requests

    for architecture, family in FAMILIES.items():
        register_family(architecture, family)
    register_renderer()
    register_attention()
    dispatch_on_architectures()
    add_elastic_flags()
    check_requests_at_admission()
    take_max_tokens_literally()
    note_what_was_sent()
    read_reports()
    account_for_ended_requests()
    show_passes_of_watched_requests()
    trace_denoising()


def register_family(architecture: str, family: Family) -> None:
    """Let vLLM serve an architecture of ``models.registry.FAMILIES``."""
    from transformers import AutoConfig, AutoTokenizer
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_elastic.engine.engine_config import DiffusionEngineConfig

    config = resolve_name(family.config)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    if family.tokenizer is not None:
        AutoTokenizer.register(config, resolve_name(family.tokenizer), exist_ok=True)
    if architecture not in ModelRegistry.models:
        ModelRegistry.register_model(architecture, family.model)
    MODELS_CONFIG_MAP[architecture] = DiffusionEngineConfig


def register_attention() -> None:
    """Let ``--attention-backend CUSTOM`` choose ours, unless another plugin took the name.

    A name of its own would be a new member of vLLM's enumeration, which a process that is spawned
    with vLLM's configuration is given before it has loaded any plugin.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if not AttentionBackendEnum.CUSTOM.is_overridden():
        register_backend(
            AttentionBackendEnum.CUSTOM,
            "vllm_elastic.attention.xformers_backend.XFormersBackend",
        )
