# SPDX-License-Identifier: Apache-2.0
"""What is registered with vLLM, and nothing else. Cheap, idempotent, loaded in every process."""

from __future__ import annotations

ARCHITECTURE = "LLaDAModelLM"


def register() -> None:
    """Entry point of ``vllm.general_plugins``.

    Raises:
        ImportError: vLLM is not installed.
    """
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    except ImportError as error:
        raise ImportError(
            "vllm_elastic needs vLLM: install vllm-elastic[cpu] or vllm-elastic[cuda]."
        ) from error
    from transformers import AutoConfig

    from vllm_elastic.engine.engine_config import LLaDAEngineConfig
    from vllm_elastic.models.llada_config import LLaDAConfig
    from vllm_elastic.patches.admission import check_requests_at_admission
    from vllm_elastic.patches.cli_flags import add_elastic_flags
    from vllm_elastic.patches.finished_answer import take_reports_of_ended_requests
    from vllm_elastic.patches.max_tokens import take_max_tokens_literally

    AutoConfig.register(LLaDAConfig.model_type, LLaDAConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(ARCHITECTURE, "vllm_elastic.models.llada:LLaDAModelLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = LLaDAEngineConfig
    add_elastic_flags()
    check_requests_at_admission()
    take_reports_of_ended_requests()
    take_max_tokens_literally()
