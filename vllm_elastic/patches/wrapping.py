# SPDX-License-Identifier: Apache-2.0
"""How a function of vLLM's is wrapped, however often the plugin is loaded in a process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let ``wrapper`` stand for ``owner.name``, which it is given ahead of a call's arguments.

    Does nothing where a function of the same module stands there already.

    Args:
        owner: a class or a module.
    """
    wrapped = getattr(owner, name)
    # Two modules wrap `to_sampling_params`, and `functools.wraps` hands on the marks of what it
    # wraps: each module has a mark of its own.
    mark = f"_wrapped_by_{wrapper.__module__}"
    if hasattr(wrapped, mark):
        return

    @functools.wraps(wrapped)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return wrapper(wrapped, *args, **kwargs)

    setattr(stand_in, mark, True)
    setattr(owner, name, stand_in)
