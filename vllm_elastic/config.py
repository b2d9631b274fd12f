# SPDX-License-Identifier: Apache-2.0
"""Every knob of the decoder, its default and its check; overrides per request.

Knows nothing of torch or vLLM: the front end, the scheduler and the simulator all read it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

REQUEST_PREFIX = "elastic_"
"""Per-request knobs travel in ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``) as elastic_*."""


class ConfigError(ValueError):
    """A knob is unknown or out of range; the message names it and says what is allowed."""


def _integer(low: int, high: int, *, optional: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON clients send 16.0
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ConfigError(
                f"must be an integer from {low} to {high}{' or null' if optional else ''}"
            )
        return value

    return check


def _number(low: float, high: float) -> Callable[[Any], float]:
    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"must be a number from {low:g} to {high:g}")
        if not low <= value <= high:  # false for NaN too
            raise ConfigError(f"must be a number from {low:g} to {high:g}")
        return float(value)

    return check


def _choice(*allowed: str, optional: bool = False) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is None and optional:
            return None
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ConfigError(f"must be one of {names}{' or null' if optional else ''}")
        return str(value)

    return check


def _flag(value: Any) -> bool:
    if value in (0, 1):  # vllm_xargs has numbers and strings, no booleans
        return bool(value)
    if not isinstance(value, bool):
        raise ConfigError("must be true or false")
    return value


def _token_ids(value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
        raise ConfigError("must be a list of token ids or null")
    return tuple(value)


def _policy(value: Any) -> str:
    from vllm_elastic.decoding.policies import POLICIES

    return _choice(*POLICIES)(value)


def _knob(
    default: Any, check: Callable[[Any], Any], *, per_request: bool = True, engine: bool = True
) -> Any:
    metadata = {"check": check, "per_request": per_request, "engine": engine}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ElasticConfig:
    """How LLaDA is decoded. Published defaults: arXiv 2510.14973, released scripts.

    Attributes:
        policy: what is recomputed when. ``none`` everything at every step; ``dual-cache`` the
            canvas at the start of each text block, else the block; ``interval`` the canvas every
            so many steps; ``elastic`` Elastic-Cache; ``elastic-block`` those KV blocks whose
            drift matters, each from its own layer.
        window: masked positions predicted at a step (beta), in positions.
        threshold: a prediction at least this probable is committed (epsilon). The best one of a
            step is committed in any case.
        gamma: drift threshold. A layer whose similarity is below it makes the cache stale from
            the next layer on. 0 never fires, above 1 always.
        track_num: most-attended positions tracked in each layer.
        refresh: what a verdict of drift does. ``replay`` discards the step's candidates and
            repeats it with the stale rows recomputed; ``next`` keeps them and lets the stale rows
            join the next step. null: the policy's own, replay for ``elastic`` (the paper) and
            next for ``elastic-block``.
        interval: denoising steps from one refresh of ``interval`` to the next.
        lazy_window: of ``elastic-block``, a step first predicts those positions of the window
            that are new in it, within ``reach`` of the last commits, or were sure before; only
            where too few of these reach the threshold another pass predicts the rest of it.
            Ignored with ``steps``.
        probes: blocks probed at a step by ``elastic-block``, one position each.
        reach: positions on either side of a just committed one that ``elastic`` and
            ``elastic-block`` compute with it: a token's neighbours feel it first. null: the
            policy's own, 0 for ``elastic`` (the paper) and 4 for ``elastic-block``.
        block_drift: of ``elastic-block``, the expected error of the window's attention beyond
            which blocks are refreshed: attention paid to stale blocks times their relative drift.
        slack: of ``elastic-block``, a refreshed block joins at the last layer whose input has
            drifted at most this share of the most drifted layer's.
        attention_stride: of ``elastic-block``, the window's attention to the blocks is read in
            every so manyth layer, counted down from the last. Reading it is most of what the
            policy costs beside its rows (docs/policies.md).
        granularity: positions a block of ``elastic-block`` has. null: the KV block.
        statistic: ``released`` cosine across heads for each key (the authors' code), ``paper``
            cosine across keys for each head.
        tokens_per_step: commit just this many positions a step, by rank; the threshold is
            ignored. null: commit by threshold.
        block_length: text block of ``dual-cache`` and of ``steps``, in positions.
        steps: LLaDA's own schedule: this many denoising steps for the whole answer, shared evenly
            by its text blocks; window, threshold and tokens_per_step are not used. null: none.
        remasking: which predictions such a step keeps: the most probable (``low_confidence``) or
            ``random`` ones.
        logits_eos_inf: end-of-text is never predicted, so the answer fills the canvas. This name
            and the next are those of LLaDA's generation code.
        confidence_eos_eot_inf: end-of-text and end-of-turn have no part in the confidences: a
            predicted one has confidence 0, and is committed only where a step has nothing else
            to commit (by threshold, then one a step).
        canvas: infilling, of a request only: the answer's token ids, with the mask's id where
            text is wanted; decoded in place. None: the answer is all masks.
        hidden_stride: the input of every so manyth layer is kept, of layers s, 2 s, ...; a refresh
            starts at the nearest of them below, or at the embedding, and drift is tested in the
            embedding's layer and in these. Memory against work (docs/policies.md).
        default_max_tokens: canvas length when a client names none.
        record: keep one entry for every pass of every request (memory: about 1 KB a pass).
        record_similarities: keep every drift test's similarities in these entries.
        record_rows: keep each pass's rows by join layer in them, which is what a simulation needs.
    """

    policy: str = _knob("elastic", _policy)
    window: int = _knob(16, _integer(1, 1 << 20))
    threshold: float = _knob(0.9, _number(0.0, 1.0))
    gamma: float = _knob(0.9, _number(0.0, 2.0))
    track_num: int = _knob(1, _integer(1, 64))
    refresh: str | None = _knob(None, _choice("replay", "next", optional=True))
    interval: int = _knob(8, _integer(1, 1 << 20))
    lazy_window: bool = _knob(False, _flag)
    probes: int = _knob(4, _integer(1, 1 << 10))
    reach: int | None = _knob(None, _integer(0, 1 << 20, optional=True))
    block_drift: float = _knob(0.02, _number(0.0, 10.0))
    slack: float = _knob(0.1, _number(0.0, 1.0))
    attention_stride: int = _knob(4, _integer(1, 1 << 10))
    granularity: int | None = _knob(32, _integer(1, 1 << 20, optional=True))
    statistic: str = _knob("released", _choice("released", "paper"))
    tokens_per_step: int | None = _knob(None, _integer(1, 1 << 20, optional=True))
    block_length: int = _knob(32, _integer(1, 1 << 20))
    steps: int | None = _knob(None, _integer(1, 1 << 20, optional=True))
    remasking: str = _knob("low_confidence", _choice("low_confidence", "random"))
    logits_eos_inf: bool = _knob(False, _flag)
    confidence_eos_eot_inf: bool = _knob(False, _flag)
    canvas: tuple[int, ...] | None = _knob(None, _token_ids, engine=False)
    hidden_stride: int = _knob(1, _integer(1, 1 << 10), per_request=False)
    default_max_tokens: int = _knob(256, _integer(1, 1 << 20), per_request=False)
    record: bool = _knob(False, _flag, per_request=False)
    record_similarities: bool = _knob(False, _flag, per_request=False)
    record_rows: bool = _knob(False, _flag, per_request=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> ElasticConfig:
        """Build from JSON-like values (``--elastic-config``, ``additional_config["elastic"]``).

        Raises:
            ConfigError: unknown key or value out of range; names the key and what is allowed.
        """
        if values is None:
            return cls()
        if not isinstance(values, Mapping):
            raise ConfigError(f"elastic config must be a JSON object, not {values!r}")
        allowed = [f.name for f in fields(cls) if f.metadata["engine"]]
        return cls()._updated(values, prefix="", allowed=allowed)

    def for_request(self, extra_args: Mapping[str, Any] | None) -> ElasticConfig:
        """These settings with one request's ``elastic_*`` overrides; other keys are not ours.

        Raises:
            ConfigError: as ``from_dict``, naming the key with its prefix.
        """
        overrides = {
            key.removeprefix(REQUEST_PREFIX): value
            for key, value in (extra_args or {}).items()
            if isinstance(key, str) and key.startswith(REQUEST_PREFIX)
        }
        if not overrides:
            return self
        allowed = [f.name for f in fields(self) if f.metadata["per_request"]]
        return self._updated(overrides, prefix=REQUEST_PREFIX, allowed=allowed)

    def _updated(
        self, values: Mapping[str, Any], *, prefix: str, allowed: list[str]
    ) -> ElasticConfig:
        checks = {f.name: f.metadata["check"] for f in fields(self)}
        checked = {}
        for key, value in values.items():
            if key not in allowed and key in checks:
                only = f"of a request only: send '{REQUEST_PREFIX}{key}'"
                if prefix:
                    only = "of the engine only: set it with --elastic-config"
                raise ConfigError(f"'{prefix}{key}' is {only}.")
            if key not in allowed:
                close = difflib.get_close_matches(str(key), allowed, n=1)
                hint = f" Did you mean '{prefix}{close[0]}'?" if close else ""
                names = ", ".join(prefix + name for name in allowed)
                raise ConfigError(f"unknown parameter '{prefix}{key}'.{hint} Allowed: {names}.")
            try:
                checked[key] = checks[key](value)
            except ConfigError as error:
                raise ConfigError(f"'{prefix}{key}' {error}, got {value!r}.") from None
        return replace(self, **checked)
