# SPDX-License-Identifier: Apache-2.0
"""vLLM's compiled grammar of a request, as the decoder sees it."""

from __future__ import annotations

import torch
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from vllm_elastic.decoding.grammar import TokenBits


class AnswerGrammar:
    """A request's ``decoding.grammar.Grammar``.

    vLLM's scheduler moves it on by the tokens that it shows.

    Args:
        vocab_size: the model's, as vLLM tells it to the library that compiles grammars.
    """

    def __init__(self, grammar: StructuredOutputGrammar, vocab_size: int) -> None:
        self._grammar = grammar
        self._bits = torch.empty(1, -(-vocab_size // 32), dtype=torch.int32, device="cpu")

    def allowed(self) -> TokenBits:
        self._bits.fill_(-1)
        if not self._grammar.is_terminated():
            self._grammar.fill_bitmask(self._bits, 0)
        bits: TokenBits = self._bits[0].numpy().copy()
        return bits

    def count_accepted(self, token_ids: list[int]) -> int:
        return len(self._grammar.validate_tokens(token_ids))
