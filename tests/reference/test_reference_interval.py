# SPDX-License-Identifier: Apache-2.0
"""The fixed interval, told again pass by pass."""

from __future__ import annotations

import pytest
import torch

from vllm_elastic.reference import DecodingOptions, IntervalOptions, LLaDA, decode, interval


class Stored:
    """Keys and values of every position at each layer, as they were last computed."""

    def __init__(self, model: LLaDA) -> None:
        self.model = model
        self.kv: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = [
            {} for _ in range(model.config.n_layers)
        ]

    def logits(self, tokens: list[int], rows: list[int]) -> dict[int, torch.Tensor]:
        """Compute some rows through all layers; their logits, without the mask token."""
        model, at = self.model, torch.tensor(rows)
        hidden = model.embed(torch.tensor(tokens)[at])
        for layer, kv in enumerate(self.kv):
            q, k, v = model.project(layer, hidden, at)
            kv.update({row: (k[:, i], v[:, i]) for i, row in enumerate(rows)})
            keys, values = (
                torch.stack([kv[row][part] for row in range(len(tokens))], dim=1) for part in (0, 1)
            )
            hidden = model.finish(layer, hidden, model.attend(q, keys, values))
        logits = model.head(hidden).double()
        logits[:, model.config.mask_token_id] = -torch.inf
        return dict(zip(rows, logits, strict=True))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("shape", ["mha", "gqa6-tied"])
def test_interval_told_again(endless, shape, every, shift):
    model, prompt = endless(shape, vocab=30, shift=shift), [3, 1, 4]
    tokens = prompt + [model.config.mask_token_id] * 14
    stored, committed, steps = Stored(model), [], []
    while window := [i for i, t in enumerate(tokens) if t == model.config.mask_token_id][:5]:
        rows = list(range(17))
        if len(steps) % every:
            rows = sorted({i - shift for i in window} | set(committed))
        logits = stored.logits(tokens, rows)
        best = {i: logits[i - shift].softmax(dim=-1).max(dim=-1) for i in window}
        bar = min(0.5, max(float(p) for p, _ in best.values()))
        committed = [i for i in window if float(best[i][0]) >= bar]
        for i in committed:
            tokens[i] = int(best[i][1])
        kind = "first" if not steps else "full" if len(rows) == 17 else "window"
        steps.append((kind, len(rows), committed))

    result = interval(model, prompt, 14, IntervalOptions(window=5, threshold=0.5, interval=every))
    assert result.canvas_ids == tokens
    assert [(s["kind"], s["rows"], s["committed"]) for s in result.steps] == steps
    assert result.row_layers == sum(4 * rows for _, rows, _ in steps)
    if every == 1:
        options = DecodingOptions(window=5, threshold=0.5)
        assert result.steps == decode(model, prompt, 14, options).steps
