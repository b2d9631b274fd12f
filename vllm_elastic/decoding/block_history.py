# SPDX-License-Identifier: Apache-2.0
"""What is known of each block of a canvas: its age, the attention paid to it, and its drift."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vllm_elastic.decoding.canvas import Positions

Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[np.int64]

GROWTH = 0.6
"""Drift is taken to grow with this power of the steps since the state was stored; measured are 0.5
to 1 (docs/drift.md)."""


class BlockHistory:
    """What measurements have said of the blocks of one canvas; steps are denoising steps.

    Args:
        block_size: positions of a block; num_layers: L.

    Attributes:
        rate: float32 [blocks, L], drift of each layer's input per step^GROWTH, as the last probe
            has it; 0 before the first.
        attention: float32 [blocks], what the last measurement saw the window pay.
        refreshed_at: int64 [blocks], the step whose state is stored of a block.
        probed_at: int64 [blocks], the step that measured its drift.
    """

    def __init__(self, block_size: int, num_layers: int) -> None:
        self._block_size = block_size
        self.rate: Floats = np.empty((0, num_layers), dtype=np.float32)
        self.attention: Floats = np.empty(0, dtype=np.float32)
        self.refreshed_at: Steps = np.empty(0, dtype=np.int64)
        self.probed_at: Steps = np.empty(0, dtype=np.int64)
        self._written_at: Steps = np.empty(0, dtype=np.int64)  # of positions

    def extend(self, length: int, step: int) -> None:
        """What the canvas has grown by is as of this step; how fast it drifts is not known."""
        grown = length - len(self._written_at)
        if not grown:
            return
        new = -(-length // self._block_size) - len(self.rate)
        self.rate = np.pad(self.rate, ((0, new), (0, 0)))
        self.attention = np.pad(self.attention, (0, new))
        self.refreshed_at = np.append(self.refreshed_at, np.full(new, step))
        self.probed_at = np.append(self.probed_at, np.full(new, step))
        self._written_at = np.append(self._written_at, np.full(grown, step))

    def restart(self, step: int) -> None:
        """All blocks are as of this step."""
        for steps in (self.refreshed_at, self.probed_at, self._written_at):
            steps[:] = step

    def written(self, positions: Positions, step: int) -> None:
        """These positions' state is as of this step, whatever the rest of their blocks is of."""
        self._written_at.put(positions, step)

    def take_probes(self, probes: Positions, drift: Floats, step: int) -> None:
        """Take how far probes, no two of one block, have drifted since they were stored.

        Args:
            drift: float32 [probes, L].
        """
        blocks = probes // self._block_size
        age = np.maximum(step - self._written_at[probes], 1)
        self.rate[blocks] = drift / (age**GROWTH)[:, None]
        self.probed_at[blocks] = step

    def drift(self, step: int) -> npt.NDArray[np.float64]:
        """float64 [blocks], expected at a step, of the layer where it is largest."""
        return self.rate.max(axis=1) * np.maximum(step - self.refreshed_at, 0) ** GROWTH


def attention_of_blocks(
    attention: Floats, watched: npt.NDArray[np.bool_], block_size: int
) -> tuple[Floats, Positions]:
    """Attention by blocks of ``block_size`` positions, of watched positions alone.

    Args:
        attention: float32 [T]; watched: bool [T].

    Returns:
        float32 [blocks] the watched positions' attention, and int32 [blocks] the most attended one
        of each block, the smaller position on a tie, -1 where none is watched.
    """
    num_blocks = -(-len(attention) // block_size)
    by_position = np.full(num_blocks * block_size, -1.0, dtype=np.float32)
    np.copyto(by_position[: len(attention)], attention, where=watched)
    paid = by_position.reshape(num_blocks, block_size)
    most_attended = paid.argmax(axis=1) + np.arange(0, len(by_position), block_size)
    most_attended[by_position[most_attended] < 0] = -1
    return np.maximum(paid, 0).sum(axis=1), most_attended.astype(np.int32)
