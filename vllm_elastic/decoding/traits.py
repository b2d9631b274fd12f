# SPDX-License-Identifier: Apache-2.0
"""All that decoding has to know of an architecture: one value, found once for each model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DecodingTraits:
    """What admission, the scheduler and the runner read instead of the model's configuration.

    Attributes:
        num_layers: L.
        vocab_size: token ids are 0 .. vocab_size - 1.
        mask_token_id: what an undecided position holds.
        end_of_text_id, end_of_turn_id: None where the model has none.
        stop_ids: tokens that end an answer beside the tokenizer's own end of text.
        never_chosen: ids that no candidate may be; the mask is one of them.
        logits_shift: the logits of position p are those of row p - logits_shift: 0, or 1 for a
            model that was trained on from one that predicts the next token (Dream).
        grow_by: positions that are appended to an answer at a time where nobody says otherwise; 0:
            all of them from the start.
    """

    num_layers: int
    vocab_size: int
    mask_token_id: int
    end_of_text_id: int | None = None
    end_of_turn_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    never_chosen: tuple[int, ...] = ()
    logits_shift: int = 0
    grow_by: int = 0

    @property
    def text_end_ids(self) -> tuple[int, ...]:
        """End-of-text, end-of-turn, then other stops, as far as the model has them; each once."""
        ends = (self.end_of_text_id, self.end_of_turn_id, *self.stop_ids)
        return tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))
