# SPDX-License-Identifier: Apache-2.0
"""What an answer may be, read from left to right."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

TokenBits = npt.NDArray[np.int32]
"""int32 [at least V / 32], a bit for each token, the lowest first."""


class Grammar(Protocol):
    """One request's grammar, as of the tokens shown so far: whoever shows them moves it on."""

    def allowed(self) -> TokenBits:
        """Which tokens may come next."""
        ...

    def count_accepted(self, token_ids: list[int]) -> int:
        """How many of these may come next, one after the other."""
        ...
