# SPDX-License-Identifier: Apache-2.0
"""Every knob: default, range, and how a wrong value is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_elastic.config import REQUEST_PREFIX, ConfigError, ElasticConfig
from vllm_elastic.decoding.policies import POLICIES

MILLION = 1 << 20
HUGE = 10**400  # no float holds it; Python's JSON parser reads it as an int
# A JSON client's vllm_xargs has no booleans.
FLAGS = [(True, True), (False, False), (1, True), (0, False)]
NO_FLAGS = [2, -1, 0.5, "true", None, [1]]

# knob: default, values it takes (as given -> as kept), values it refuses
KNOBS: dict[str, tuple[Any, list[tuple[Any, Any]], list[Any]]] = {
    "policy": (
        "elastic",
        [(name, name) for name in POLICIES],
        ["", "Elastic", "lru", None, 1, True, ["elastic"], {}],
    ),
    "window": (16, [(1, 1), (16.0, 16), (MILLION, MILLION)], [0, -1, MILLION + 1, 1.5]),
    "threshold": (0.9, [(0, 0.0), (1, 1.0), (0.5, 0.5)], [-0.01, 1.01, 2]),
    "gamma": (0.9, [(0, 0.0), (2, 2.0), (1.5, 1.5)], [-0.01, 2.01]),
    "track_num": (1, [(1, 1), (64, 64)], [0, 65, 1.5]),
    "refresh": (None, [(None, None), ("next", "next"), ("replay", "replay")], ["Next", "", 1]),
    "interval": (8, [(1, 1), (MILLION, MILLION)], [0, -1, 1.5]),
    "lazy_window": (False, FLAGS, NO_FLAGS),
    "probes": (4, [(1, 1), (1024, 1024)], [0, 1025, 1.5]),
    "reach": (None, [(None, None), (0, 0), (64.0, 64)], [-1, 1.5]),
    "block_drift": (0.02, [(0, 0.0), (10, 10.0)], [-0.01, 10.5]),
    "slack": (0.1, [(0, 0.0), (1, 1.0)], [-0.01, 1.01]),
    "attention_stride": (4, [(1, 1), (8.0, 8)], [0, -1, 1.5, 1025]),
    "granularity": (32, [(None, None), (1, 1), (64.0, 64)], [0, -1, 1.5]),
    "statistic": (
        "released",
        [("released", "released"), ("paper", "paper")],
        ["", "Paper", None, 0],
    ),
    "tokens_per_step": (
        None,
        [(None, None), (1, 1), (4.0, 4), (MILLION, MILLION)],
        [0, -1, MILLION + 1, 0.5],
    ),
    "block_length": (32, [(1, 1), (MILLION, MILLION)], [0, MILLION + 1, 1.5]),
    "steps": (None, [(None, None), (1, 1), (64.0, 64), (MILLION, MILLION)], [0, -1, 0.5]),
    "remasking": (
        "low_confidence",
        [("random", "random"), ("low_confidence", "low_confidence")],
        ["Random", "", None, 1],
    ),
    "logits_eos_inf": (False, FLAGS, NO_FLAGS),
    "confidence_eos_eot_inf": (False, FLAGS, NO_FLAGS),
    "hidden_stride": (1, [(1, 1), (1024, 1024)], [0, 1025, 1.5]),
    "default_max_tokens": (256, [(1, 1), (MILLION, MILLION)], [0, MILLION + 1, 1.5]),
    "record": (False, FLAGS, NO_FLAGS),
    "record_similarities": (False, FLAGS, NO_FLAGS),
    "record_rows": (False, FLAGS, NO_FLAGS),
}
NUMBERS = [
    "window",
    "threshold",
    "gamma",
    "track_num",
    "interval",
    "probes",
    "reach",
    "block_drift",
    "slack",
    "attention_stride",
    "granularity",
    "tokens_per_step",
    "block_length",
    "steps",
    "hidden_stride",
    "default_max_tokens",
]
SERVER_ONLY = [
    "hidden_stride",
    "default_max_tokens",
    "record",
    "record_similarities",
    "record_rows",
]
PER_REQUEST = [name for name in KNOBS if name not in SERVER_ONLY]

# What no number knob takes.
NOT_A_NUMBER = {
    "true": True,
    "false": False,
    "nan": float("nan"),
    "inf": float("inf"),
    "minus-inf": float("-inf"),
    "string": "1",
    "empty": "",
    "list": [1],
    "object": {"a": 1},
    "complex": 1j,
    "bytes": b"1",
    "1e308": 1e308,
    "huge": HUGE,
    "minus-huge": -HUGE,
}


def accepted_values() -> list[Any]:
    return [
        pytest.param(name, given_value, kept, id=f"{name}={given_value}")
        for name, (_, accepted, _) in KNOBS.items()
        for given_value, kept in accepted
    ]


def refused_values() -> list[Any]:
    refused = [
        pytest.param(name, value, id=f"{name}={value!r}")
        for name, (_, _, values) in KNOBS.items()
        for value in values
    ]
    for name in NUMBERS:
        refused += [
            pytest.param(name, value, id=f"{name}={label}") for label, value in NOT_A_NUMBER.items()
        ]
    return refused


def test_every_knob_is_tested() -> None:
    """A new knob would go without a test of its range."""
    assert [f.name for f in fields(ElasticConfig) if f.metadata["engine"]] == list(KNOBS)
    assert [f.name for f in fields(ElasticConfig) if not f.metadata["engine"]] == ["canvas"]


def test_infilling_is_of_a_request_only() -> None:
    """An engine-wide canvas would be every request's answer."""
    assert ElasticConfig().for_request({"elastic_canvas": [0, 5]}).canvas == (0, 5)
    for value in ([], 5, "5", [-1], [1.5], [True], ["5"], [None]):
        with pytest.raises(ConfigError, match="'elastic_canvas' must be a list of token ids"):
            ElasticConfig().for_request({"elastic_canvas": value})
    with pytest.raises(ConfigError, match="'canvas' is of a request only: send 'elastic_canvas'"):
        ElasticConfig.from_dict({"canvas": [5]})


def test_defaults() -> None:
    """Users who configure nothing would not get the published settings."""
    for config in (ElasticConfig(), ElasticConfig.from_dict(None), ElasticConfig.from_dict({})):
        assert {name: getattr(config, name) for name in KNOBS} == {
            name: default for name, (default, _, _) in KNOBS.items()
        }


@pytest.mark.parametrize(("name", "value", "kept"), accepted_values())
def test_accepted(name: str, value: Any, kept: Any) -> None:
    """A value at the end of its range, or an integer that JSON made a float, would be refused."""
    config = ElasticConfig.from_dict({name: value})
    assert getattr(config, name) == kept
    assert type(getattr(config, name)) is type(kept)
    assert replace(config, **{name: KNOBS[name][0]}) == ElasticConfig()  # nothing else changed


@pytest.mark.parametrize(("name", "value"), refused_values())
def test_refused(name: str, value: Any) -> None:
    """A bad value would be a 500 or, worse, be used."""
    with pytest.raises(ConfigError) as error:
        ElasticConfig.from_dict({name: value})
    assert str(error.value).startswith(f"'{name}' must be ")
    assert "got " in str(error.value)


@pytest.mark.parametrize("name", PER_REQUEST)
def test_a_request_may_override(name: str) -> None:
    """A knob would not be settable over HTTP."""
    served = ElasticConfig(window=7)
    value, kept = KNOBS[name][1][-1]
    config = served.for_request({REQUEST_PREFIX + name: value})
    assert config == replace(served, **{name: kept})
    assert served == ElasticConfig(window=7)


@pytest.mark.parametrize(
    ("name", "value"), [p for p in refused_values() if p.values[0] in PER_REQUEST]
)
def test_refused_in_a_request(name: str, value: Any) -> None:
    """The error would name a key that the client did not send."""
    with pytest.raises(ConfigError) as error:
        ElasticConfig().for_request({REQUEST_PREFIX + name: value})
    assert str(error.value).startswith(f"'{REQUEST_PREFIX}{name}' must be ")


@pytest.mark.parametrize("name", SERVER_ONLY)
def test_a_request_may_not_override_the_servers_own(name: str) -> None:
    """A client could make the server keep records until it has no memory."""
    value = KNOBS[name][1][0][0]
    with pytest.raises(ConfigError, match=f"'{REQUEST_PREFIX}{name}' is of the engine only"):
        ElasticConfig().for_request({REQUEST_PREFIX + name: value})


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1, "gamma": "x", 3: 4}])
def test_other_arguments_of_a_request_are_not_ours(extra_args: dict[Any, Any] | None) -> None:
    """Another plugin's arguments would be refused."""
    served = ElasticConfig(gamma=0.5)
    assert served.for_request(extra_args) is served


@pytest.mark.parametrize(
    ("key", "meant"),
    [("gama", "gamma"), ("windows", "window"), ("blocklength", "block_length"), ("Policy", None)],
)
def test_a_misspelt_key_gets_a_hint(key: str, meant: str | None) -> None:
    """A typo would be ignored, or the hint would lack the prefix that the client has to send."""
    for prefix in ("", REQUEST_PREFIX):
        with pytest.raises(ConfigError) as error:
            if prefix:
                ElasticConfig().for_request({prefix + key: 1})
            else:
                ElasticConfig.from_dict({key: 1})
        message = str(error.value)
        assert message.startswith(f"unknown parameter '{prefix}{key}'.")
        if meant is not None:
            assert f"Did you mean '{prefix}{meant}'?" in message
        for name in PER_REQUEST:
            assert prefix + name in message.split("Allowed: ")[1]


@pytest.mark.parametrize("key", ["", " gamma", "elastic_gamma", "x" * 10_000, 3, None, (1, 2)])
def test_unknown_keys(key: Any) -> None:
    """A key that cannot even be a name would raise something else."""
    with pytest.raises(ConfigError, match="unknown parameter"):
        ElasticConfig.from_dict({key: 1})


@pytest.mark.parametrize("values", [[], [1], "gamma", 3, True, [("gamma", 1)]])
def test_only_an_object_is_a_config(values: Any) -> None:
    """--elastic-config '[1]' would end in a traceback."""
    with pytest.raises(ConfigError, match="must be a JSON object"):
        ElasticConfig.from_dict(values)


def test_a_request_sees_the_servers_settings() -> None:
    """Overriding one knob would reset the others to their defaults."""
    served = ElasticConfig.from_dict({"gamma": 0.5, "window": 4, "record": True})
    config = served.for_request({"elastic_gamma": 0.25})
    assert config == replace(served, gamma=0.25)


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
@given(st.dictionaries(KEYS, JSON, max_size=4))
@example({"gamma": HUGE})
@example({"window": HUGE})
@example({"logits_eos_inf": 0})
def test_nothing_but_config_errors(values: dict[str, Any]) -> None:
    """A client could get a 500, or a message that does not say which key is wrong."""
    try:
        config = ElasticConfig.from_dict(values)
    except ConfigError as error:
        assert any(f"'{key}'" in str(error) for key in values)
        return
    for name, value in values.items():
        kept = getattr(config, name)
        assert kept == value
        # A flag is also 0 or 1, since vllm_xargs has no booleans; nothing else takes a boolean.
        is_flag = isinstance(KNOBS[name][0], bool)
        assert isinstance(kept, bool) == is_flag
        assert is_flag or not isinstance(value, bool)


@settings(deadline=None)
@given(st.dictionaries(KEYS.map(lambda key: REQUEST_PREFIX + key), JSON, min_size=1, max_size=4))
def test_nothing_but_config_errors_in_a_request(extra_args: dict[str, Any]) -> None:
    """As above, over HTTP."""
    try:
        ElasticConfig().for_request(extra_args)
    except ConfigError as error:
        assert any(f"'{key}'" in str(error) for key in extra_args)


def test_numbers_that_json_can_write() -> None:
    """Python reads a 400-digit integer from a request's JSON; it must be a ConfigError too."""
    for name in NUMBERS:
        for text in ("1" + "0" * 400, "1e400", "-1e400", "NaN", "Infinity", "true"):
            with pytest.raises(ConfigError, match=f"^'{name}' must be "):
                ElasticConfig.from_dict(json.loads(f'{{"{name}": {text}}}'))
