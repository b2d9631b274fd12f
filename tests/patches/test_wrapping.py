# SPDX-License-Identifier: Apache-2.0
"""A function of vLLM's is wrapped once by each patch."""

from __future__ import annotations

from collections.abc import Callable

from vllm_elastic.patches.wrapping import wrap_once


def test_each_module_wraps_once() -> None:
    """A plugin that is loaded twice would do its work twice, or one patch keep another one out."""

    class Owner:
        def name(self, word: str) -> str:
            return word

    def of_module(module: str) -> Callable[..., str]:
        def wrapper(wrapped: Callable[..., str], self: Owner, word: str) -> str:
            return f"{module}({wrapped(self, word)})"

        wrapper.__module__ = module
        return wrapper

    stock = Owner.name
    for module in ("first", "second", "first", "second"):
        wrap_once(Owner, "name", of_module(module))
    assert Owner().name("said") == "second(first(said))"
    assert Owner.name.__wrapped__.__wrapped__ is stock  # type: ignore[attr-defined]
