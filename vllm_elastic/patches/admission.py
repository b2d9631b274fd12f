# SPDX-License-Identifier: Apache-2.0
"""Checks a request before it enters the engine, so that a bad one is a 400 and nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.serial_utils import MsgpackEncoder

from vllm_elastic.config import ElasticConfig, elastic_config_of
from vllm_elastic.decoding.policies import make_policy
from vllm_elastic.decoding.schedule import check_steps, growth_of, make_schedule
from vllm_elastic.engine.engine_config import is_served_by_us
from vllm_elastic.engine.sampling import end_token_ids_of, sampling_of
from vllm_elastic.engine.sampling_rules import RULES
from vllm_elastic.models.registry import traits_of
from vllm_elastic.patches.max_tokens import take_note
from vllm_elastic.patches.sent_parameters import forget_echo, misplaced_knobs, sent_as
from vllm_elastic.patches.wrapping import wrap_once
from vllm_elastic.runner.limits import limits_of

LARGEST_BIAS = 1e4
"""Over HTTP vLLM cuts biases at 100; a `SamplingParams` may hold any number, or none."""


def check_requests_at_admission() -> None:
    """Wrap ``InputProcessor.process_inputs``, once. Requests of other models pass untouched.

    See patches/admission: vLLM has no hook that sees the prompt's length and can still refuse.
    """
    wrap_once(InputProcessor, "process_inputs", _checked)


def _checked(
    process_inputs: Callable[..., Any], self: InputProcessor, *args: Any, **kwargs: Any
) -> Any:
    # (request_id, prompt, params, ...)
    sent = kwargs.get("params", args[2] if len(args) > 2 else None)
    ours = is_served_by_us(self.vllm_config)
    if ours:
        check_place_of_knobs(misplaced_knobs(sent))
        check_bad_words(sent)  # before the tokenizer meets them
    take_note(sent, self.vllm_config)
    if ours:
        forget_echo(sent)
    request = process_inputs(self, *args, **kwargs)
    params = request.sampling_params
    if ours and params is not None:
        end_at_stops(params, self.vllm_config)
        check_prompt(request, self.vllm_config)
        config = check_knobs(params, self.vllm_config)
        check_sampling_params(params, sent_as(sent))
        check_canvas(len(request.prompt_token_ids), params, self.vllm_config)
        check_saved_rows(len(request.prompt_token_ids), params, config, self.vllm_config)
        check_candidates(params, config, self.vllm_config)
        check_grammar(params, config, sent_as(sent), self.vllm_config, self.tokenizer)
        check_transport(request)
    return request


def check_place_of_knobs(misplaced: Mapping[str, str]) -> None:
    """Refuse knobs where vLLM's server does not look: they would have no effect.

    Args:
        misplaced: from ``misplaced_knobs``.

    Raises:
        VLLMValidationError: names the first and where it belongs.
    """
    if misplaced:
        sent, place = next(iter(misplaced.items()))
        name = sent.encode(errors="backslashreplace").decode()  # half a surrogate pair
        raise VLLMValidationError(
            f"{name} stands {place} and would be passed over; send it at the top of the body "
            f'within: "vllm_xargs": {{"{name}": ...}}.',
            parameter=name,
        )


def check_bad_words(params: object) -> None:
    """Refuse words that no tokenizer takes; vLLM's server calls it a 500.

    Raises:
        VLLMValidationError: half a surrogate pair.
    """
    for word in getattr(params, "bad_words", None) or ():
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise VLLMValidationError(
                f"bad_words: {word!r} cannot be sent to the engine: {error.reason}.",
                parameter="bad_words",
            ) from None


def end_at_stops(params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Let the model's own ``stop_ids`` end an answer, unless the request ignores its ends.

    Stock vLLM takes these from a generation_config.json, where Dream's do not stand.
    """
    own = traits_of(vllm_config.model_config.hf_config).stop_ids
    if own and not params.ignore_eos:
        params.stop_token_ids = list(dict.fromkeys([*(params.stop_token_ids or ()), *own]))


def check_prompt(request: EngineCoreRequest, vllm_config: VllmConfig) -> None:
    """Refuse a prompt that is no sequence of known tokens from start to end.

    Raises:
        VLLMValidationError: says what the prompt has that it may not have.
    """
    if request.prompt_token_ids is None:
        raise VLLMValidationError(
            "prompt_embeds: a canvas needs token ids; send the prompt as text or token ids.",
            parameter="prompt_embeds",
        )
    traits = traits_of(vllm_config.model_config.hf_config)
    mask_token_id = traits.mask_token_id
    if mask_token_id in request.prompt_token_ids:
        raise VLLMValidationError(
            f"prompt: contains the mask token (id {mask_token_id}), which would never be filled "
            "in; take it out (max_tokens says how many masks follow the prompt).",
            parameter="prompt",
        )
    # vLLM checks this with a tokenizer only.
    wrong = [t for t in request.prompt_token_ids if not 0 <= t < traits.vocab_size]
    if wrong:
        raise VLLMValidationError(
            f"prompt: token id {wrong[0]} is not in the vocabulary, 0 to {traits.vocab_size - 1}.",
            parameter="prompt",
        )
    # An image's placeholders are known to vLLM; one without an image would read what is not there.
    images = sum(feature.mm_position.length for feature in request.mm_features or ())
    lone = request.prompt_token_ids.count(traits.image_token_id) - images
    if lone:
        raise VLLMValidationError(
            f"image: the prompt has {lone} <image> (token id {traits.image_token_id}) more than "
            "images; send an image for each, or take it out.",
            parameter="image",
        )
    if request.resumable:
        raise VLLMValidationError(
            "streaming input is not supported by vllm_elastic: a canvas is decoded as a whole; "
            "send the prompt in one piece."
        )


def check_canvas(prompt_length: int, params: SamplingParams, vllm_config: VllmConfig) -> None:
    """Refuse a canvas that the model cannot hold; vLLM's start sees to it that the KV cache can.

    Raises:
        VLLMValidationError: names max_tokens, both numbers and the remedy.
    """
    assert params.max_tokens is not None
    canvas = prompt_length + params.max_tokens
    limit = vllm_config.model_config.max_model_len
    if canvas > limit:
        raise VLLMValidationError(
            f"max_tokens={params.max_tokens} (or max_completion_tokens; the engine's "
            f"default_max_tokens where a request names none) is the canvas: with a prompt of "
            f"{prompt_length} tokens it makes {canvas} positions, but the model's maximum length "
            f"is {limit}. Lower it to {max(limit - prompt_length, 0)} or shorten the prompt.",
            parameter="max_tokens",
            value=params.max_tokens,
        )


def check_saved_rows(
    prompt_length: int, params: SamplingParams, config: ElasticConfig, vllm_config: VllmConfig
) -> None:
    """Refuse a request whose steps may keep more for their measurements than the engine has room.

    Args:
        config: the request's own settings.

    Raises:
        VLLMValidationError: names the knobs, both numbers and the remedy.
    """
    canvas = prompt_length + (params.max_tokens or 1)
    num_layers = traits_of(vllm_config.model_config.hf_config).num_layers
    most = make_policy(config).most_saved_rows(canvas, num_layers)
    limit = limits_of(vllm_config).saved_rows
    if most > limit:
        knob = config.bounding_knob
        sent = knob != "max_window"  # which is the engine's
        bound = f"elastic_{knob}" if sent else f"the engine's {knob}"
        lower = f"elastic_{knob}, " if sent else ""
        raise VLLMValidationError(
            f"{bound}={config.most_predicted}: with reach and track_num a step of policy "
            f"{config.policy} may keep {most} rows of this canvas for its measurements, and the "
            f"engine has room for {limit}. Lower {lower}elastic_reach or elastic_track_num, or "
            "raise max_window with --elastic-config.",
            parameter="vllm_xargs",
        )


def check_knobs(params: SamplingParams, vllm_config: VllmConfig) -> ElasticConfig:
    """The request's own settings; refuses those that are unknown or do not fit its canvas.

    Raises:
        VLLMValidationError: names the knob and what is allowed.
    """
    try:
        config = elastic_config_of(vllm_config).for_request(params.extra_args)
        make_schedule(config, params.max_tokens or 1)
        check_steps(config, params.max_tokens or 1)
        growth_of(config, traits_of(vllm_config.model_config.hf_config).grow_by)
        if config.canvas is not None:
            _check_infilling(config.canvas, params.max_tokens or 1, vllm_config)
    except ValueError as error:  # a ConfigError, or knobs that do not go together
        raise VLLMValidationError(str(error), parameter="vllm_xargs") from None
    return config


def check_sampling_params(params: SamplingParams, sent: Mapping[str, str]) -> None:
    """Refuse what would otherwise be ignored or fail in the worker.

    Args:
        sent: from ``sent_as``.

    Raises:
        VLLMValidationError: names the parameter and what is allowed.
    """
    for name, rule in RULES.items():
        value = getattr(params, name, None)
        if rule.status == "refused" and not _is_one_of(value, rule.neutral):
            # vLLM appends parameter and value to the message.
            shown = name not in sent and isinstance(value, str | int | float)
            called = sent.get(name, name)
            raise VLLMValidationError(
                f"{called} is not supported by vllm_elastic: {rule.note}",
                parameter=called.split()[0],
                value=value if shown else None,
            )
    for token_ids in params.bad_words_token_ids or ():
        if len(token_ids) > 1:
            raise VLLMValidationError(
                f"bad_words: a word of {len(token_ids)} tokens is not supported by vllm_elastic, "
                "whose tokens are not committed in order; ban words of one token, or use stop.",
                parameter="bad_words",
            )


def check_grammar(
    params: SamplingParams,
    config: ElasticConfig,
    sent: Mapping[str, str],
    vllm_config: VllmConfig,
    tokenizer: Any,
) -> None:
    """Refuse a grammar for an answer that is not written from left to right, or has no end, and
    JSON of a model that has no quotation mark to write it with, as the test model.

    Args:
        config: the request's own settings.
        sent: from ``sent_as``.
        tokenizer: the model's; None: vLLM was started without it.

    Raises:
        VLLMValidationError: names what does not go together, or what was sent.
    """
    wanted = params.structured_outputs
    if wanted is None or wanted.all_constraints_none():
        return
    called = sent.get("structured_outputs", "structured_outputs")
    for knob in ("canvas", "steps", "alg"):
        if getattr(config, knob) is not None:
            raise VLLMValidationError(
                f"{called} and 'elastic_{knob}' do not go together: a grammar is followed from "
                "left to right; leave one out.",
                parameter=called,
            )
    if params.ignore_eos:
        raise VLLMValidationError(
            f"{called} and ignore_eos do not go together: the grammar says where an answer ends; "
            "leave one out.",
            parameter="ignore_eos",
        )
    check_end_of_grammar(params, config, called, vllm_config)
    structured = vllm_config.structured_outputs_config
    if structured.reasoning_parser and not structured.enable_in_reasoning:
        raise VLLMValidationError(
            f"{called}: this server takes what an answer begins with for reasoning, which no "
            "grammar would bind; start it without --reasoning-parser, or with "
            "--structured-outputs-config.enable_in_reasoning true.",
            parameter=called,
        )
    of_json = wanted.json is not None or wanted.json_object
    if of_json and tokenizer is not None and not _has_quotation_mark(tokenizer):
        raise VLLMValidationError(
            f"{called}: no token of this model has a quotation mark, so it cannot write JSON; send "
            "a choice or a regex of what it can write.",
            parameter=called,
        )


def check_end_of_grammar(
    params: SamplingParams, config: ElasticConfig, called: str, vllm_config: VllmConfig
) -> None:
    """Refuse a grammar beside what leaves it no end token: its answer would end with an error.

    Args:
        config: the request's own settings.
        called: what the client sent the grammar as.

    Raises:
        VLLMValidationError: names the parameters and the remedy.
    """
    traits = traits_of(vllm_config.model_config.hf_config)
    # vLLM lets a grammar end with any of these.
    ends = params.all_stop_token_ids.difference(traits.never_chosen)
    allowed = params.allowed_token_ids
    # What rules ends out, by what to do about it.
    ruled_out = {
        "leave out min_tokens": ends if params.min_tokens else set(),
        "send 'elastic_logits_eos_inf': 0": (
            {traits.end_of_text_id} if config.logits_eos_inf else set()
        ),
        "add it to allowed_token_ids": ends.difference(allowed) if allowed else set(),
        "take it out of bad_words": {ids[0] for ids in params.bad_words_token_ids or ()},
        "take it out of logit_bias": {
            token_id
            for token_id, bias in (params.logit_bias or {}).items()
            if _is_minus_infinity(bias)
        },
    }
    if ends and ends <= set().union(*ruled_out.values()):
        remedies = [remedy for remedy, token_ids in ruled_out.items() if ends & token_ids]
        raise VLLMValidationError(
            f"{called}: the grammar says where an answer ends, and needs an end token (id "
            f"{', '.join(map(str, sorted(ends)))}) there; {' and '.join(remedies)}.",
            parameter=called,
        )


@functools.lru_cache(maxsize=4)
def _has_quotation_mark(tokenizer: Any) -> bool:
    return any('"' in token or token == "<0x22>" for token in tokenizer.get_vocab())


def check_candidates(
    params: SamplingParams, config: ElasticConfig, vllm_config: VllmConfig
) -> None:
    """Refuse biases that are no numbers, and constraints that together leave no token to choose.

    Args:
        config: the request's own settings.

    Raises:
        VLLMValidationError: names the parameters.
    """
    biases = (params.logit_bias or {}).items()
    for token_id, bias in biases:
        if not isinstance(bias, int | float) or not bias <= LARGEST_BIAS:  # NaN too
            raise VLLMValidationError(
                f"logit_bias: {bias!r} for token id {token_id}; a bias is a number up to "
                f"{LARGEST_BIAS:g}.",
                parameter="logit_bias",
            )
    traits = traits_of(vllm_config.model_config.hf_config)
    sampling = sampling_of(params, config, 0, traits, end_token_ids_of(params))
    if sampling is None:
        return
    never = {*traits.never_chosen, *sampling.banned_token_ids, *sampling.end_token_ids}
    never |= {token_id for token_id, bias in biases if _is_minus_infinity(bias)}
    allowed = sampling.allowed_token_ids
    candidates = range(traits.vocab_size) if allowed is None else allowed
    if all(token_id in never for token_id in candidates):
        raise VLLMValidationError(
            "no token is left to choose from. allowed_token_ids, bad_words and an infinitely low "
            "logit_bias rule tokens out, ignore_eos the end tokens, min_tokens and a fixed token "
            "in elastic_canvas the end and stop tokens ahead of them, and the mask token never "
            "counts; allow more tokens.",
            parameter="bad_words" if allowed is None else "allowed_token_ids",
        )


def check_transport(request: EngineCoreRequest) -> None:
    """Refuse what cannot be sent to the engine's process; vLLM's server calls it a 500.

    Raises:
        VLLMValidationError: an integer of more than 64 bits, half a surrogate pair in a text.
    """
    try:
        MsgpackEncoder().encode(request)
    except (OverflowError, UnicodeEncodeError, RecursionError) as error:
        reason = str(error).encode(errors="backslashreplace").decode()
        raise VLLMValidationError(
            f"the request holds a value that cannot be sent to the engine: {reason}"
        ) from None
    except TypeError:
        pass  # an object in extra_args, which are not ours: no problem within one process


def _check_infilling(canvas: tuple[int, ...], max_tokens: int, vllm_config: VllmConfig) -> None:
    if len(canvas) != max_tokens:
        raise ValueError(
            f"'elastic_canvas' has {len(canvas)} token ids and max_tokens is {max_tokens}; send "
            f"max_tokens={len(canvas)}."
        )
    traits = traits_of(vllm_config.model_config.hf_config)
    if traits.mask_token_id not in canvas:
        raise ValueError(
            f"'elastic_canvas' has no mask token (id {traits.mask_token_id}): nothing to find."
        )
    if max(canvas) >= traits.vocab_size:
        raise ValueError(
            f"'elastic_canvas' has token id {max(canvas)}; the vocabulary ends at "
            f"{traits.vocab_size - 1}."
        )


def _is_minus_infinity(bias: float) -> bool:
    return bias < -1e30  # in float32


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    # Not `in`: comparing with a numpy array gives an array.
    number = isinstance(value, int | float)
    return any(value is wanted or (number and value == wanted) for wanted in neutral)
