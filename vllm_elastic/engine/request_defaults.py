# SPDX-License-Identifier: Apache-2.0
"""What a request gets where it names nothing: judged once at start, whoever it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.schedule import check_steps, make_schedule
from vllm_elastic.engine.sampling_rules import RULES

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.request_defaults")

_CEILING = "elastic_max_tokens_ceiling"  # key in additional_config
_OURS = "vllm_elastic's default"
_FILE = "the model's generation_config.json"
_OVERRIDE = "--override-generation-config"

_TAKEN_BY_VLLM = (
    *("temperature", "top_k", "top_p", "min_p", "max_new_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Values of a generation config that become a request's: `ModelConfig.get_diff_sampling_param`."""


def set_request_defaults(vllm_config: VllmConfig, elastic: ElasticConfig) -> None:
    """Make an operator's values, ours and the model's the engine's, in this order, and say so.

    LLaDA's authors decode greedily, and a client that names no length gets the default canvas,
    whatever the model's generation_config.json has. Of its other values those that a LLaDA cannot
    heed are passed over.

    Raises:
        ValueError: an operator's value is one that a request could not send, or a canvas that no
            request could be given; names the flag.
    """
    model = vllm_config.model_config
    operators = dict(model.override_generation_config)
    _refuse(operators, _OVERRIDE)
    ours = {"temperature": 0.0, "max_new_tokens": elastic.default_max_tokens}
    files = _from_file(model)
    if model.generation_config == "auto":
        layers = {_FILE: _without_refused(files), _OURS: ours, _OVERRIDE: operators}
        # All of it is in the override now; vLLM would say that it came from the model's file.
        model.generation_config = "vllm"
    else:
        _refuse(files, "--generation-config")
        layers = {_OURS: ours, "--generation-config": files, _OVERRIDE: operators}
    model.override_generation_config = {k: v for own in layers.values() for k, v in own.items()}
    ceiling = {_CEILING: operators.get("max_new_tokens")}  # an operator's default is one too
    vllm_config.additional_config = ceiling | vllm_config.additional_config
    _log(layers)
    source = next(own for own in reversed(layers) if "max_new_tokens" in layers[own])
    _refuse_unusable_canvas(model, elastic, source)


def max_tokens_ceiling(vllm_config: VllmConfig) -> int | None:
    """The operator's ``--override-generation-config '{"max_new_tokens": N}'``, or None."""
    ceiling: int | None = vllm_config.additional_config.get(_CEILING)
    return ceiling


def _refuse_unusable_canvas(model: ModelConfig, elastic: ElasticConfig, source: str) -> None:
    """A canvas that a client did not ask for must not be the reason why it is refused.

    ``LLM.generate`` without ``SamplingParams`` asks for none, as a plain request over HTTP.

    Args:
        source: of ``max_new_tokens``.
    """
    canvas: int = model.override_generation_config["max_new_tokens"]
    flag, name = source, "max_new_tokens"
    if source == _OURS:
        flag, name = "--elastic-config", "default_max_tokens"
    if canvas >= model.max_model_len:
        if name != "default_max_tokens" or canvas != ElasticConfig().default_max_tokens:
            raise ValueError(
                f"{flag}: {name} {canvas} leaves no room for a prompt in max_model_len "
                f"{model.max_model_len}; lower it, or raise --max-model-len (vllm_elastic)."
            )
        logger.warning(
            "a request over HTTP that names no max_tokens is refused: its canvas of %d leaves no "
            "room for a prompt in max_model_len %d; set default_max_tokens with --elastic-config",
            canvas,
            model.max_model_len,
        )
    if elastic.fixed_steps:
        try:
            make_schedule(elastic, canvas)
            check_steps(elastic, canvas)
        except ValueError as error:
            raise ValueError(
                f"{flag}: with {name} {canvas}, the max_tokens of a request that names none: "
                f"{error}"
            ) from None


def _from_file(model: ModelConfig) -> dict[str, Any]:
    """Sampling values of the generation_config.json that --generation-config points to."""
    if model.generation_config == "vllm":
        return {}
    found = model.try_get_generation_config()
    return {name: found[name] for name in _TAKEN_BY_VLLM if found.get(name) is not None}


def _refuse(values: dict[str, Any], flag: str) -> None:
    for name, value in values.items():
        if _is_refused(name, value):
            raise ValueError(
                f"{flag}: {name} {value!r} would make every request fail: {RULES[name].note} "
                "(vllm_elastic)."
            )


def _without_refused(values: dict[str, Any]) -> dict[str, Any]:
    for name, value in values.items():
        if _is_refused(name, value):
            logger.warning(
                "%s %r of the model's generation_config.json is not used: %s",
                name,
                value,
                RULES[name].note,
            )
    return {name: value for name, value in values.items() if not _is_refused(name, value)}


def _is_refused(name: str, value: Any) -> bool:
    return name in RULES and RULES[name].status == "refused" and value not in RULES[name].neutral


def _log(layers: dict[str, dict[str, Any]]) -> None:
    """Each value with its source, the last layer that has it."""
    said: dict[str, tuple[Any, str]] = {}
    for source, values in layers.items():
        for name, value in values.items():
            former, words = said.get(name, (value, ""))
            before = "" if former == value else f", in place of {words}"
            said[name] = value, f"{value} ({source}{before})"
    logger.info(
        "a request that does not name them gets %s",
        ", ".join(f"{name} {words}" for name, (_, words) in said.items()),
    )
