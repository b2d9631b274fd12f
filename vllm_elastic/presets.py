# SPDX-License-Identifier: Apache-2.0
"""Settings with a name: what a user picks before turning single knobs.

Knows no other module: a preset is what it sets beside the knobs' own defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A starting point; other knobs override it.

    Attributes:
        meaning: when to take it, for the docs.
        knobs: what it sets; all other decoding knobs have their defaults.
    """

    meaning: str
    knobs: Mapping[str, Any]


_RELEASED = {
    "policy": "elastic",
    "window": 16,
    "commit": "threshold",
    "threshold": 0.9,
    "gamma": 0.9,
    "track_num": 1,
    "statistic": "released",
    "reach": 0,
    "refresh": "replay",
}

DEFAULT_PRESET = "block"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        DEFAULT_PRESET: Preset(
            "what the bare command runs: only those blocks are refreshed whose drift the "
            "window's attention would feel",
            {},
        ),
        "published": Preset(
            "Elastic-Cache (arXiv 2510.14973) as its authors' released code has it, but that the "
            "mask token is never committed",
            _RELEASED,
        ),
        "paper": Preset(
            "the same with the drift statistic that the paper describes",
            {**_RELEASED, "statistic": "paper"},
        ),
        "exact": Preset(
            "no cache: everything is recomputed at every step, with the window and the commit rule "
            "of `block`",
            {"policy": "none"},
        ),
    }
)
