# SPDX-License-Identifier: Apache-2.0
"""Which of several test processes runs what."""

from __future__ import annotations

from xdist.scheduler import LoadFileScheduling


class OneServer(LoadFileScheduling):
    """A file's tests in one process, and all of ``tests/server`` in one: it starts the server that
    they share, which takes most of a minute."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "server" if "/server/" in file else file
