# SPDX-License-Identifier: Apache-2.0
"""Options of a config.json that change what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse_options(
    family: str, keys: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]]
) -> None:
    """End the start where a file asks for what is not computed here.

    Args:
        family: what messages call the model.
        only: values that are computed, by key; a file may leave a key out.

    Raises:
        ValueError: names the key and what it may be.
    """
    for key, allowed in only.items():
        if key in keys and keys[key] not in allowed:
            raise ValueError(
                f"{family} config: {key}={keys[key]!r} is not supported, only "
                f"{' or '.join(map(repr, allowed))}."
            )
