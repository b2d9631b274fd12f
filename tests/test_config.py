# SPDX-License-Identifier: Apache-2.0
"""Every knob: default, range, and how a wrong value is refused; presets; the page."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_elastic.config import POLICIES, REQUEST_PREFIX, ConfigError, ElasticConfig, page
from vllm_elastic.decoding import policies
from vllm_elastic.presets import DEFAULT_PRESET, PRESETS

ROOT = Path(__file__).parent.parent
MILLION = 1 << 20
HUGE = 10**400  # no float holds it; Python's JSON parser reads it as an int
# A JSON client's vllm_xargs has no booleans.
FLAG = ([(True, True), (False, False), (1, True), (0, False)], [2, -1, 0.5, "true", None, [1]])


def names(*allowed: str) -> tuple[list[Any], list[Any]]:
    wrong = ["", allowed[0].upper(), 1, True, [allowed[0]], {}]
    return [(name, name) for name in allowed], wrong


# knob: default, (values it takes: as given, as kept), (values it refuses)
KNOBS: dict[str, tuple[Any, list[tuple[Any, Any]], list[Any]]] = {
    "preset": (DEFAULT_PRESET, [(name, name) for name in PRESETS], ["", "Block", None, 1]),
    "policy": ("elastic-block", *names(*policies.POLICIES)),
    "window": (16, [(1, 1), (16.0, 16), (1024, 1024)], [0, -1, 1.5, MILLION + 1]),
    "threshold": (0.9, [(0, 0.0), (1, 1.0), (0.5, 0.5)], [-0.01, 1.01, 2]),
    "commit": (
        "frontier",
        *names(
            "threshold", "frontier", "steady", "credit", "factor", "frechet", "local", "entropy"
        ),
    ),
    "frontier_threshold": (0.5, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "steady_threshold": (0.8, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "credit_decay": (0.8, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "credit_weight": (0.7, [(0, 0.0), (10, 10.0)], [-0.01, 10.01]),
    "factor": (0.75, [(0, 0.0), (10, 10.0), (1.5, 1.5)], [-0.01, 10.01]),
    "frechet_margin": (0.25, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "relaxed_threshold": (0.75, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "anchor_radius": (4, [(0, 0), (MILLION, MILLION)], [-1, 1.5, MILLION + 1]),
    "entropy_bound": (0.1, [(0, 0.0), (100, 100.0)], [-0.01, 100.5]),
    "gamma": (0.9, [(0, 0.0), (2, 2.0), (1.5, 1.5)], [-0.01, 2.01]),
    "track_num": (1, [(1, 1), (64, 64)], [0, 65, 1.5]),
    "statistic": ("released", *names("released", "paper")),
    "refresh": (None, [(None, None), *names("next", "replay")[0]], names("next")[1]),
    "interval": (8, [(1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "probes": (8, [(1, 1), (1024, 1024)], [0, 1025]),
    "measure_every": (4, [(1, 1), (1024, 1024)], [0, 1025]),
    "reach": (None, [(None, None), (0, 0), (64.0, 64)], [-1, 1.5, MILLION + 1]),
    "block_drift": (0.05, [(0, 0.0), (10, 10.0)], [-0.01, 10.5]),
    "rows_per_pass": (0, [(0, 0), (MILLION, MILLION)], [-1, 1.5, MILLION + 1]),
    "slack": (0.1, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "attention_stride": (4, [(1, 1), (1024, 1024)], [0, 1025]),
    "granularity": (32, [(None, None), (1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "tokens_per_step": (None, [(None, None), (1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "block_length": (32, [(1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "steps": (None, [(None, None), (1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "grow_by": (None, [(None, None), (0, 0), (32, 32)], [-1, 1.5, MILLION + 1]),
    "grow_ahead": (0, [(0, 0), (MILLION, MILLION)], [-1, 1.5, None]),
    "remasking": ("low_confidence", *names("low_confidence", "random")),
    "alg": (
        None,
        [
            (None, None),
            *names("origin", "maskgit_plus", "topk_margin", "entropy")[0],
        ],
        ["", "Entropy", 1],
    ),
    "alg_temp": (0.0, [(0, 0.0), (100, 100.0), (0.1, 0.1)], [-0.01, 100.5, None]),
    "logits_eos_inf": (False, *FLAG),
    "confidence_eos_eot_inf": (False, *FLAG),
    "canvas": (
        None,
        [(None, None), ([0, 5], (0, 5)), ((7,), (7,))],
        [[], 5, "5", [-1], [1.5], [True], ["5"], [None]],
    ),
    "watch": (False, *FLAG),
    "allow_watch": (True, *FLAG),
    "max_window": (1024, [(64, 64), (MILLION, MILLION)], [0, MILLION + 1]),
    "hidden_stride": (1, [(1, 1), (1024, 1024)], [0, 1025]),
    "default_max_tokens": (256, [(1, 1), (MILLION, MILLION)], [0, MILLION + 1]),
    "record": (False, *FLAG),
    "record_similarities": (False, *FLAG),
    "record_rows": (False, *FLAG),
    "record_canvas": (False, *FLAG),
}
REQUEST_ONLY = ["canvas", "watch"]
ENGINE_ONLY = [
    "allow_watch",
    "max_window",
    "hidden_stride",
    "default_max_tokens",
    "record",
    "record_similarities",
    "record_rows",
    "record_canvas",
]
PER_REQUEST = [name for name in KNOBS if name not in ENGINE_ONLY]


def test_every_knob_is_tested() -> None:
    """A new knob would go without a test of its range, or be open to clients by accident."""
    assert [f.name for f in fields(ElasticConfig)] == list(KNOBS)
    assert [f.name for f in fields(ElasticConfig) if f.metadata["per_request"]] == PER_REQUEST


def test_policies_are_the_registered_ones() -> None:
    """A policy could not be named, or a name would be a KeyError in the scheduler."""
    assert list(POLICIES) == list(policies.POLICIES)


def test_defaults() -> None:
    """Users who configure nothing would not get the preset that the docs name."""
    for config in (ElasticConfig(), ElasticConfig.from_dict(None), ElasticConfig.from_dict({})):
        assert {name: getattr(config, name) for name in KNOBS} == {
            name: default for name, (default, _, _) in KNOBS.items()
        }


def ways_to_set(name: str) -> list[tuple[str, Any]]:
    """(prefix, function of a value that sets the knob): of the engine, of a request, or both."""
    ways: list[tuple[str, Any]] = []
    if name not in REQUEST_ONLY:
        ways.append(("", lambda value: ElasticConfig.from_dict({name: value})))
    if name in PER_REQUEST:
        key = REQUEST_PREFIX + name
        ways.append((REQUEST_PREFIX, lambda value: ElasticConfig().for_request({key: value})))
    return ways


@pytest.mark.parametrize("name", KNOBS)
def test_range(name: str) -> None:
    """A value at the end of its range would be refused, or one beyond it be used."""
    default, accepted, refused = KNOBS[name]
    for prefix, set_to in ways_to_set(name):
        for value, kept in accepted:
            config = set_to(value)
            assert getattr(config, name) == kept
            assert type(getattr(config, name)) is type(kept)
            if name != "preset":  # nothing else changed
                assert replace(config, **{name: default}) == ElasticConfig()
        for value in refused:
            with pytest.raises(ConfigError) as error:
                set_to(value)
            assert str(error.value).startswith(f"'{prefix}{name}' must be "), value
            assert str(error.value).endswith(f", got {value!r}.")


@pytest.mark.parametrize("name", ["window", "reach", "gamma"], ids=["integer", "or null", "number"])
@pytest.mark.parametrize(
    "value",
    [
        True,
        float("nan"),
        float("inf"),
        float("-inf"),
        "1",
        "",
        [1],
        {"a": 1},
        1j,
        b"1",
        HUGE,
        -HUGE,
    ],
    ids=lambda value: repr(value)[:9],
)
def test_what_no_number_takes(name: str, value: Any) -> None:
    """A client could send a boolean for a number, or an integer that no float holds."""
    with pytest.raises(ConfigError, match=f"^'{name}' must be "):
        ElasticConfig.from_dict({name: value})


def test_numbers_that_json_can_write() -> None:
    """Python reads a 400-digit integer from a request's JSON; it must be a ConfigError too."""
    for name in ("window", "gamma"):
        for text in ("1" + "0" * 400, "1e400", "-1e400", "NaN", "Infinity", "true"):
            with pytest.raises(ConfigError, match=f"^'{name}' must be "):
                ElasticConfig.from_dict(json.loads(f'{{"{name}": {text}}}'))


def test_a_request_overrides_what_it_names_only() -> None:
    """Overriding one knob would reset the others, or change them for the next request."""
    served = ElasticConfig.from_dict({"gamma": 0.5, "window": 4, "record": True})
    config = served.for_request({"elastic_gamma": 0.25, "other": 1})
    assert config == replace(served, gamma=0.25)
    assert served == ElasticConfig(gamma=0.5, window=4, record=True)


def test_who_may_set_what() -> None:
    """A client could make the server keep records until it has no memory; an engine-wide canvas
    would be every request's answer."""
    for name in ENGINE_ONLY:
        with pytest.raises(ConfigError, match=f"'elastic_{name}' is of the engine only: set it"):
            ElasticConfig().for_request({REQUEST_PREFIX + name: KNOBS[name][1][0][0]})
    with pytest.raises(ConfigError, match="'canvas' is of a request only: send 'elastic_canvas'"):
        ElasticConfig.from_dict({"canvas": [5]})


def test_an_operator_may_forbid_watching() -> None:
    """A switch that a client could turn, or that refuses who does not watch, is none."""
    served = ElasticConfig.from_dict({"allow_watch": False})
    for asked in ({"elastic_watch": 1}, {"elastic_watch": True, "elastic_preset": "exact"}):
        with pytest.raises(ConfigError, match=r"^'elastic_watch' is switched off .*leave it out"):
            served.for_request(asked)
        assert ElasticConfig().for_request(asked).watch
    assert not served.for_request({"elastic_watch": 0}).watch


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1, "gamma": "x", 3: 4}])
def test_other_arguments_of_a_request_are_not_ours(extra_args: dict[Any, Any] | None) -> None:
    """Another plugin's arguments would be refused."""
    served = ElasticConfig(gamma=0.5)
    assert served.for_request(extra_args) is served


@pytest.mark.parametrize("prefix", ["", REQUEST_PREFIX])
def test_a_misspelt_key_gets_a_hint(prefix: str) -> None:
    """A typo would be ignored, or the hint would lack the prefix that the client has to send."""
    meant = {"gama": "gamma", "windows": "window", "blocklength": "block_length", "Policy": None}
    for key, name in meant.items():
        with pytest.raises(ConfigError) as error:
            if prefix:
                ElasticConfig().for_request({prefix + key: 1})
            else:
                ElasticConfig.from_dict({key: 1})
        message = str(error.value)
        assert message.startswith(f"unknown parameter '{prefix}{key}'.")
        assert name is None or f"Did you mean '{prefix}{name}'?" in message
        for known in PER_REQUEST:
            if prefix or known not in REQUEST_ONLY:
                assert prefix + known in message.split("Allowed: ")[1]


@pytest.mark.parametrize("key", ["", " gamma", "elastic_gamma", "x" * 10_000, 3, None, (1, 2)])
def test_unknown_keys(key: Any) -> None:
    """A key that cannot even be a name would raise something else."""
    with pytest.raises(ConfigError, match="unknown parameter"):
        ElasticConfig.from_dict({key: 1})


@pytest.mark.parametrize("values", [[], "gamma", 3, True, [("gamma", 1)]])
def test_only_an_object_is_a_config(values: Any) -> None:
    """--elastic-config '[1]' would end in a traceback."""
    with pytest.raises(ConfigError, match="must be a JSON object"):
        ElasticConfig.from_dict(values)


RELEASED = ElasticConfig(
    preset="published",
    policy="elastic",
    window=16,
    commit="threshold",
    threshold=0.9,
    gamma=0.9,
    track_num=1,
    statistic="released",
    reach=0,
    refresh="replay",
)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("block", ElasticConfig()),
        ("published", RELEASED),
        ("paper", replace(RELEASED, preset="paper", statistic="paper")),
        ("exact", ElasticConfig(preset="exact", policy="none")),
    ],
)
def test_presets(preset: str, expected: ElasticConfig) -> None:
    """A preset would not be what its name says, or its order among the keys would matter."""
    assert ElasticConfig.from_dict({"preset": preset}) == expected
    assert ElasticConfig().for_request({"elastic_preset": preset}) == expected
    for values in ({"preset": preset, "window": 5}, {"window": 5, "preset": preset}):
        assert ElasticConfig.from_dict(values) == replace(expected, window=5)


def test_a_preset_of_a_request_undoes_the_engines_decoding_knobs_only() -> None:
    """The published algorithm would run with some of the server's own knobs; or a client could
    set back what is the engine's."""
    engine = {"max_window": 99, "hidden_stride": 2, "default_max_tokens": 7, "record": True}
    decoding = {"steps": 8, "tokens_per_step": 3, "reach": 9, "refresh": "next", "gamma": 0.1}
    served = ElasticConfig.from_dict({**engine, **decoding})
    config = served.for_request({"elastic_preset": "published", "elastic_gamma": 0.7})
    assert config == replace(RELEASED, gamma=0.7, **engine)


def test_what_a_step_may_predict_is_bounded() -> None:
    """One request could take all memory with a window of a million positions."""
    served = ElasticConfig.from_dict({"max_window": 100})
    too_wide = [
        ({"window": 101}, "window"),
        ({"policy": "dual-cache", "block_length": 101}, "block_length"),
        ({"policy": "none", "steps": 4, "block_length": 101}, "block_length"),
    ]
    for values, knob in too_wide:
        at_most = {**values, knob: 100}
        request = {REQUEST_PREFIX + name: value for name, value in values.items()}
        assert getattr(served.for_request({f"{REQUEST_PREFIX}{knob}": 100}), knob) == 100
        assert ElasticConfig.from_dict({"max_window": 100, **at_most}).max_window == 100
        for prefix, make in (
            ("", lambda: ElasticConfig.from_dict({"max_window": 100, **values})),  # noqa: B023
            (REQUEST_PREFIX, lambda: served.for_request(request)),  # noqa: B023
        ):
            message = f"^'{prefix}{knob}' is 101, .*'max_window' 100 .*lower {knob}, or raise max_w"
            with pytest.raises(ConfigError, match=message):
                make()
    # What is not used is no reason to refuse.
    assert served.for_request({"elastic_block_length": 4096}).block_length == 4096
    wide = {"elastic_policy": "dual-cache", "elastic_window": 4096}
    assert served.for_request(wide).window == 4096
    with pytest.raises(ConfigError, match=r"^'elastic_window' is 4096"):
        served.for_request({"elastic_window": 4096})


def test_the_bound_holds_for_presets_and_defaults_too() -> None:
    """An engine of narrow windows would be widened by naming a preset, or by saying nothing."""
    with pytest.raises(ConfigError, match=r"^'window' is 16, .*'max_window' 12"):
        ElasticConfig.from_dict({"max_window": 12})
    served = ElasticConfig.from_dict({"max_window": 12, "window": 12})
    assert served.for_request({"elastic_gamma": 0.5}).window == 12
    with pytest.raises(ConfigError, match=r"^'elastic_window' is 16"):
        served.for_request({"elastic_preset": "exact"})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "preset block, policy elastic-block; set beside it: -"),
        (
            {"preset": "paper", "gamma": 0.8, "record": True},
            "preset paper, policy elastic; set beside it: gamma=0.8, record=True",
        ),
        ({"policy": "none"}, "preset block, policy none; set beside it: policy=none"),
    ],
)
def test_summary(values: dict[str, Any], expected: str) -> None:
    """The log would not say what runs."""
    assert ElasticConfig.from_dict(values).summary() == expected


def test_page_is_current() -> None:
    written_by = "python -m vllm_elastic.config > docs/configuration.md"
    assert (ROOT / "docs/configuration.md").read_text() == page(), written_by


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -HUGE])
    | st.floats()
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from(list(KNOBS)) | st.text(max_size=12)


@settings(deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=4), st.sampled_from(["", REQUEST_PREFIX]))
@example({"gamma": HUGE}, "")
@example({"window": HUGE}, REQUEST_PREFIX)
@example({"logits_eos_inf": 0}, "")
@example({"window": 2000}, REQUEST_PREFIX)
def test_nothing_but_config_errors(values: dict[str, Any], prefix: str) -> None:
    """A client could get a 500, or a message that does not say which key is wrong."""
    sent = {prefix + key: value for key, value in values.items()}
    try:
        config = ElasticConfig().for_request(sent) if prefix else ElasticConfig.from_dict(sent)
    except ConfigError as error:
        touched = {*sent, prefix + "window", prefix + "block_length"}
        assert any(f"'{key}'" in str(error) for key in touched)
        return
    for name, value in values.items():
        kept = getattr(config, name)
        assert kept == (tuple(value) if name == "canvas" and value is not None else value)
        # A flag is also 0 or 1, since vllm_xargs has no booleans; nothing else takes a boolean.
        is_flag = isinstance(KNOBS[name][0], bool)
        assert isinstance(kept, bool) == is_flag
        assert is_flag or not isinstance(value, bool)
