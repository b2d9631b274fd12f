# SPDX-License-Identifier: Apache-2.0
"""Every knob of the decoder: its default, its range and its meaning; overrides per request.

Knows nothing of torch or vLLM: the front end, the scheduler and the simulator all read it.
``python -m vllm_elastic.config`` prints docs/configuration.md.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from vllm_elastic.presets import DEFAULT_PRESET, PRESETS

REQUEST_PREFIX = "elastic_"
"""Per-request knobs travel in ``SamplingParams.extra_args`` (HTTP: ``vllm_xargs``) as elastic_*."""

POLICIES = ("none", "dual-cache", "interval", "elastic", "elastic-block")
"""Names of the policies in ``decoding.policies``, which reads this module."""

COMMIT_RULES = (
    "threshold",
    "frontier",
    "steady",
    "credit",
    "factor",
    "frechet",
    "local",
    "entropy",
)
"""Names of the rules in ``decoding.commits``, likewise."""

STATISTICS = ("released", "paper")
"""What `elastic` compares: as its authors' code does, and as their paper words it."""

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")
"""Names of Dream's samplers, as its generation code has them."""

BLOCK_SIZE = 32
"""Positions of a KV block, unless --block-size says otherwise. CPU kernels want multiples of 32."""

_MOST = 1 << 20


class ConfigError(ValueError):
    """A knob is unknown or out of range; the message names it and says what is allowed."""


@dataclass(frozen=True)
class Range:
    """The values that a knob takes.

    Attributes:
        allowed: in words, after "must be".
        keep: a value as it came, perhaps from JSON, to the value as it is kept; ValueError for one
            that is not allowed.
    """

    allowed: str
    keep: Callable[[Any], Any]


def _or_null(allowed: Range) -> Range:
    return Range(
        f"{allowed.allowed} or null", lambda value: None if value is None else allowed.keep(value)
    )


def _integer(low: int, high: int) -> Range:
    def keep(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON clients send 16.0
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Range(f"an integer from {low} to {high}", keep)


def _number(low: float, high: float) -> Range:
    def keep(value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not low <= value <= high:  # false for NaN too
            raise ValueError
        return float(value)

    return Range(f"a number from {low:g} to {high:g}", keep)


def _choice(*names: str) -> Range:
    def keep(value: Any) -> str:
        if value not in names:
            raise ValueError
        return str(value)

    return Range(f"one of {', '.join(map(repr, names))}", keep)


def _keep_flag(value: Any) -> bool:
    if value not in (0, 1):  # vllm_xargs has numbers and strings, no booleans
        raise ValueError
    return bool(value)


def _keep_token_ids(value: Any) -> tuple[int, ...]:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or any(isinstance(v, bool) or not isinstance(v, int) or v < 0 for v in value):
        raise ValueError
    return tuple(value)


_FLAG = Range("true or false", _keep_flag)
_TOKEN_IDS = Range("a list of token ids", _keep_token_ids)


def _knob(
    default: Any,
    allowed: Range,
    meaning: str,
    *,
    per_request: bool = True,
    engine: bool = True,
) -> Any:
    metadata = {"range": allowed, "meaning": meaning, "per_request": per_request, "engine": engine}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ElasticConfig:
    """How a canvas is decoded: one field a knob, whose ``meaning`` stands beside it.

    The defaults are those of the preset ``block``.
    """

    preset: str = _knob(
        DEFAULT_PRESET,
        _choice(*PRESETS),
        "the starting point, which the other knobs override; of a request, it takes the place of "
        "all the engine's knobs that a request may set",
    )
    policy: str = _knob(
        "elastic-block", _choice(*POLICIES), "what is recomputed when ([policies](policies.md))"
    )
    window: int = _knob(
        16,
        _integer(1, _MOST),
        "masked positions predicted at a step (the paper's beta): the leftmost ones. Not used "
        "where text blocks are predicted (`dual-cache`, `steps`)",
    )
    threshold: float = _knob(
        0.9,
        _number(0.0, 1.0),
        "of the commit rules `threshold`, `frontier`, `steady`, `credit` and `local`: a prediction "
        "at least this probable is committed (epsilon)",
    )
    commit: str = _knob(
        "frontier",
        _choice(*COMMIT_RULES),
        "which predictions of a step are committed together ([commit rules](commit-rules.md)); "
        "the best one in any case. Not used with `tokens_per_step`, `steps` or `alg`",
    )
    frontier_threshold: float = _knob(
        0.5,
        _number(0.0, 1.0),
        "of the commit rules `frontier` and `steady`: the threshold at the first masked position, "
        "before which all is decided; from `threshold` on it changes nothing",
    )
    steady_threshold: float = _knob(
        0.8,
        _number(0.0, 1.0),
        "of the commit rule `steady`: the threshold for a prediction that the step before made "
        "too; it has to reach it both times. From `threshold` on it changes nothing",
    )
    credit_decay: float = _knob(
        0.8,
        _number(0.0, 1.0),
        "of the commit rule `credit`: the share of a token's credit that is left at the next step",
    )
    credit_weight: float = _knob(
        0.7,
        _number(0.0, 10.0),
        "of the commit rule `credit`: a prediction's odds are multiplied by 1 plus its token's "
        "credit to this power; 0 is `threshold`",
    )
    factor: float = _knob(
        0.75,
        _number(0.0, 10.0),
        "of the commit rule `factor`: the n most probable tokens are committed together, for the "
        "largest n with (n + 1)(1 - c) < `factor`, where c is the probability of the least "
        "probable of them; larger commits more",
    )
    frechet_margin: float = _knob(
        0.25,
        _number(0.0, 1.0),
        "of the commit rule `frechet`: how much more probable than any other choice the tokens "
        "committed together have to be, at the least; larger commits fewer",
    )
    relaxed_threshold: float = _knob(
        0.75,
        _number(0.0, 1.0),
        "of the commit rule `local`: the threshold near a prediction that reaches `threshold`; "
        "from `threshold` on it changes nothing",
    )
    anchor_radius: int = _knob(
        4,
        _integer(0, _MOST),
        "of the commit rule `local`: positions on either side of such a prediction that are near",
    )
    entropy_bound: float = _knob(
        0.1,
        _number(0.0, 100.0),
        "of the commit rule `entropy`: the most, in nats, that the entropies of the tokens "
        "committed together, without the largest, add up to; larger commits more",
    )
    gamma: float = _knob(
        0.9,
        _number(0.0, 2.0),
        "of `elastic`: a layer whose similarity is below it makes the cache stale from the next "
        "layer on; 0 never, above 1 always. Does not carry over between models or statistics",
    )
    track_num: int = _knob(
        1, _integer(1, 64), "of `elastic`: most attended positions tracked in each layer"
    )
    statistic: str = _knob(
        "released",
        _choice(*STATISTICS),
        "of `elastic`: cosine across heads for each key (the authors' code), or across keys for "
        "each head",
    )
    refresh: str | None = _knob(
        None,
        _or_null(_choice("replay", "next")),
        "what a verdict of drift does: `replay` discards the step's candidates and repeats it "
        "with the stale rows recomputed; `next` keeps them and lets the stale rows join the next "
        "step. null: the policy's own, `replay` for `elastic`, `next` for `elastic-block`",
    )
    interval: int = _knob(
        8, _integer(1, _MOST), "of `interval`: denoising steps from one refresh to the next"
    )
    probes: int = _knob(
        8,
        _integer(1, 1 << 10),
        "of `elastic-block`: blocks probed at a time, one position each",
    )
    measure_every: int = _knob(
        4,
        _integer(1, 1 << 10),
        "of `elastic-block`: denoising steps from one measurement to the next. The steps between "
        "them probe nothing and read no attention, so a measurement decides by the drift that is "
        "expected at the next one",
    )
    reach: int | None = _knob(
        None,
        _or_null(_integer(0, _MOST)),
        "of `elastic` and `elastic-block`: positions on either side of a just committed one that "
        "are computed with it. null: the policy's own, 0 for `elastic` (the paper), 4 for "
        "`elastic-block`",
    )
    block_drift: float = _knob(
        0.05,
        _number(0.0, 10.0),
        "of `elastic-block`: expected error of the window's attention beyond which blocks are "
        "refreshed: attention paid to stale blocks times their relative drift",
    )
    rows_per_pass: int = _knob(
        0,
        _integer(0, _MOST),
        "of `elastic-block`: a request's pass that has fewer rows than this is filled up with rows "
        "of stale blocks, the costliest first, even where `block_drift` asks for no refresh. For "
        "devices on which a pass of few rows takes as long as one of many, such as a GPU with few "
        "requests ([what it buys](policies.md#rows-to-spare)); 0 fills nothing up",
    )
    slack: float = _knob(
        0.1,
        _number(0.0, 1.0),
        "of `elastic-block`: a refreshed block joins at the layer before the first one whose input "
        "has drifted more than this share of the most drifted layer's",
    )
    attention_stride: int = _knob(
        4,
        _integer(1, 1 << 10),
        "of `elastic-block`: the window's attention to the blocks is read in the last layer and "
        "then in every one that is this many layers lower",
    )
    granularity: int | None = _knob(
        32,
        _or_null(_integer(1, _MOST)),
        "positions of a block, which `elastic-block` refreshes as a whole; null: as many as a "
        "KV block has",
    )
    tokens_per_step: int | None = _knob(
        None,
        _or_null(_integer(1, _MOST)),
        "commit just this many positions a step, by rank, whatever the commit rule says; null: by "
        "rule",
    )
    block_length: int = _knob(
        32, _integer(1, _MOST), "text block of `dual-cache` and of `steps`, in positions"
    )
    steps: int | None = _knob(
        None,
        _or_null(_integer(1, _MOST)),
        "LLaDA's own schedule: this many denoising steps for the whole answer, shared evenly by "
        "its text blocks; `window`, `commit`, `threshold` and `tokens_per_step` are not used. "
        "`max_tokens` must be a multiple of `block_length`, `steps` of the number of blocks. With "
        "`alg` Dream's schedule, which has no blocks. At most `max_tokens`",
    )
    grow_by: int | None = _knob(
        None,
        _or_null(_integer(0, _MOST)),
        "positions that an answer grows by: the next ones are appended when all before them are "
        "committed (sooner with `grow_ahead`), and no mask stands behind them until then. 0: all "
        "`max_tokens` masks are there from the start. null: as the model's authors decode, 32 for "
        "iLLaDA and 0 for all others. A multiple of `block_length` where text blocks are "
        "predicted; infilling and `alg` do not grow",
    )
    grow_ahead: int = _knob(
        0,
        _integer(0, _MOST),
        "of an answer that grows: the next positions are appended as soon as fewer than so many "
        "stand from the first masked one on. Masks that the text cannot reach yet cost work and "
        "say little. Not used with `steps`",
    )
    remasking: str = _knob(
        "low_confidence",
        _choice("low_confidence", "random"),
        "of `steps` without `alg`: a step keeps its most probable predictions, or random ones",
    )
    alg: str | None = _knob(
        None,
        _or_null(_choice(*ALGORITHMS)),
        "Dream's own sampler ([what each does](models.md#dreams-own-sampler)): `steps` denoising "
        "steps, `max_tokens` of them where `steps` is null, each of which predicts all masks; what "
        "`steps` does not use is not used here either. Not with `dual-cache`",
    )
    alg_temp: float = _knob(
        0.0,
        _number(0.0, 100.0),
        "of `alg` but `origin`: above 0 a step's commits are drawn by softmax(confidence / "
        "alg_temp); 0 takes the most confident",
    )
    logits_eos_inf: bool = _knob(
        False,
        _FLAG,
        "end-of-text is never predicted, so the answer fills the canvas. Named, like the next, as "
        "in LLaDA's generation code",
    )
    confidence_eos_eot_inf: bool = _knob(
        False,
        _FLAG,
        "end-of-text and end-of-turn have no part in the confidences: a predicted one has "
        "confidence 0, and is committed only where a step has nothing else to commit (by "
        "rule, then one a step)",
    )
    canvas: tuple[int, ...] | None = _knob(
        None,
        _or_null(_TOKEN_IDS),
        "infilling: the answer's token ids, `max_tokens` of them, with the mask's id where text is "
        "wanted. Fixed tokens stay, and no end token is chosen ahead of one. null: all masks",
        engine=False,
    )
    watch: bool = _knob(
        False,
        _FLAG,
        "of a streamed chat: an event for every pass, in the order in which tokens are committed "
        "([seeing it](see.md#a-running-server))",
        engine=False,
    )
    allow_watch: bool = _knob(
        True,
        _FLAG,
        "whether a request may ask for `watch`, which costs the server some 2 KB a pass; false "
        "makes it a 400",
        per_request=False,
    )
    max_window: int = _knob(
        1024,
        _integer(1, _MOST),
        "the most positions that a step of any request may predict: bounds its `window`, or its "
        "`block_length` with `dual-cache` and `steps` (with `elastic` on a longer canvas `reach` "
        "and `track_num` as well), and so the memory that one request can take",
        per_request=False,
    )
    hidden_stride: int = _knob(
        1,
        _integer(1, 1 << 10),
        "s keeps the inputs of layers s, 2s, ... only, and is less than the number of layers. "
        "Refreshes start at these layers, and drift is tested there ([memory against "
        "work](policies.md#memory-hidden_stride))",
        per_request=False,
    )
    default_max_tokens: int = _knob(
        256, _integer(1, _MOST), "canvas when a client of the server names none", per_request=False
    )
    record: bool = _knob(
        False,
        _FLAG,
        "keep one entry for every pass of every request (benchmarks; about 1 KB a pass)",
        per_request=False,
    )
    record_similarities: bool = _knob(
        False, _FLAG, "with every drift test's similarities", per_request=False
    )
    record_rows: bool = _knob(
        False,
        _FLAG,
        "with the rows of each join layer (`bench run` sets it, `bench simulate` reads it)",
        per_request=False,
    )
    record_canvas: bool = _knob(
        False,
        _FLAG,
        "with what each pass predicted, where it computed and what it left stale (`bench run "
        "--canvas` sets it, `bench report` shows it; about 2 KB a pass)",
        per_request=False,
    )

    @property
    def fixed_steps(self) -> bool:
        """Whether the number of denoising steps is fixed: LLaDA's own schedule, or Dream's."""
        return self.steps is not None or self.alg is not None

    @property
    def predicts_text_blocks(self) -> bool:
        """Whether a step predicts a text block of ``block_length``, and not the window."""
        return self.alg is None and (self.steps is not None or self.policy == "dual-cache")

    @property
    def bounding_knob(self) -> str:
        """The knob that says how many positions a step predicts at the most."""
        if self.alg is not None:
            return "max_window"
        return "block_length" if self.predicts_text_blocks else "window"

    @property
    def most_predicted(self) -> int:
        """The most positions that a step predicts: the ``bounding_knob``'s value."""
        most: int = getattr(self, self.bounding_knob)
        return most

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
        config = self._updated(overrides, prefix=REQUEST_PREFIX, allowed=_names_per_request())
        if config.watch and not config.allow_watch:
            raise ConfigError(
                f"'{REQUEST_PREFIX}watch' is switched off here ('allow_watch' of --elastic-config "
                "is false); leave it out, or ask who runs the server."
            )
        return config

    def summary(self) -> str:
        """The preset, the policy that runs, and what differs from the preset; one line."""
        preset = ElasticConfig.from_dict({"preset": self.preset})
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        own = [f"{k}={v}" for k, v in values.items() if v != getattr(preset, k)]
        return f"preset {self.preset}, policy {self.policy}; set beside it: {', '.join(own) or '-'}"

    def _updated(
        self, values: Mapping[str, Any], *, prefix: str, allowed: list[str]
    ) -> ElasticConfig:
        ranges: dict[str, Range] = {f.name: f.metadata["range"] for f in fields(self)}
        kept = {}
        for key, value in values.items():
            if key not in allowed and key in ranges:
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
                kept[key] = ranges[key].keep(value)
            except ValueError:
                raise ConfigError(
                    f"'{prefix}{key}' must be {ranges[key].allowed}, got {value!r}."
                ) from None
        if "preset" in kept:
            kept = {**_preset_knobs(kept["preset"]), **kept}
        config = replace(self, **kept)
        config._check_most_predicted(prefix)
        return config

    def _check_most_predicted(self, prefix: str) -> None:
        knob = self.bounding_knob
        if self.most_predicted > self.max_window:
            raise ConfigError(
                f"'{prefix}{knob}' is {self.most_predicted}, and the engine's 'max_window' "
                f"{self.max_window} is the most that a step may predict; lower {knob}, or raise "
                "max_window with --elastic-config."
            )


def elastic_config_of(vllm_config: Any) -> ElasticConfig:
    """The settings that an engine of this ``VllmConfig`` is started with.

    Raises:
        ConfigError: as ``ElasticConfig.from_dict``; the start of the engine raises it first.
    """
    return ElasticConfig.from_dict(vllm_config.additional_config.get("elastic"))


def knobs_of(text: str) -> dict[str, Any]:
    """What ``--elastic-config`` takes: JSON of ``ElasticConfig.from_dict``'s values, checked.

    Raises:
        argparse.ArgumentTypeError: it is none, or a knob is unknown or out of range.
    """
    try:
        values: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not JSON ({error}); of a file take the contents: "$(cat FILE)"'
        ) from None
    try:
        ElasticConfig.from_dict(values)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return values


def _names_per_request() -> list[str]:
    return [f.name for f in fields(ElasticConfig) if f.metadata["per_request"]]


def _preset_knobs(name: str) -> dict[str, Any]:
    """Every knob that a request may set, as the preset has it."""
    defaults = {f.name: f.default for f in fields(ElasticConfig) if f.metadata["per_request"]}
    return {**defaults, **PRESETS[name].knobs}


_PAGE = """\
# Knobs

Written by `python -m vllm_elastic.config`; a test holds it against the code.

Engine-wide: `vllm serve DIR --plugin elastic --elastic-config JSON`, or
`LLM(model=DIR, additional_config={{"elastic": {{...}}}})`. Per request: the same name with the
prefix `elastic_`, in `SamplingParams(extra_args={{"elastic_window": 32}})`, or over HTTP in
`"vllm_xargs": {{"elastic_window": 32}}`. An unknown key or a value out of range is an error that
names the key and what is allowed, at start or at admission (HTTP 400). Keys without the prefix are
not ours and are passed over. `null` is for the engine and for Python: vLLM's server takes none in
`vllm_xargs`; `elastic_preset` undoes an engine's `steps`, `alg`, `tokens_per_step` or `refresh`.

## Presets

A preset is a starting point: `--elastic-config '{{"preset": "published"}}'`, or `elastic_preset`
of a request. Other knobs beside it override it. The server's log says at start which one runs.

| preset | | sets |
|---|---|---|
{presets}

[Policies](policies.md) says how they work, [benchmarks](benchmarks.md) what they cost. On a model
of your own `python -m vllm_elastic.bench tune` finds the knobs.

## All knobs

| knob | default | allowed | set by | meaning |
|---|---|---|---|---|
{knobs}

What else differs from stock vLLM: [serving](serving.md); all of vLLM's own parameters:
[sampling parameters](sampling-parameters.md).
"""


def page() -> str:
    """The presets and knobs as a Markdown page."""
    presets = [
        f"| `{name}`{' (default)' if name == DEFAULT_PRESET else ''} | {preset.meaning} | "
        f"{', '.join(f'`{k}` {_shown(v)}' for k, v in preset.knobs.items()) or 'the defaults'} |"
        for name, preset in PRESETS.items()
    ]
    knobs = [
        f"| `{f.name}` | {_shown(f.default)} | {_allowed(f)} | {_set_by(f)} | "
        f"{f.metadata['meaning']} |"
        for f in fields(ElasticConfig)
    ]
    return _PAGE.format(presets="\n".join(presets), knobs="\n".join(knobs))


def _shown(value: Any) -> str:
    return f"`{value}`" if isinstance(value, str) else json.dumps(value)


def _allowed(knob: Field[Any]) -> str:
    words: str = knob.metadata["range"].allowed
    return words.replace("'", "`").replace(str(_MOST), "2^20")


def _set_by(knob: Field[Any]) -> str:
    engine, request = knob.metadata["engine"], knob.metadata["per_request"]
    return "engine, request" if engine and request else "engine" if engine else "request"


if __name__ == "__main__":
    print(page(), end="")
