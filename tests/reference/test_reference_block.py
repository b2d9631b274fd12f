# SPDX-License-Identifier: Apache-2.0
"""Block-level invalidation: where it has to be no cache at all, and which rows it computes."""

from __future__ import annotations

import pytest

from vllm_elastic.reference import (
    DecodingOptions,
    ElasticBlock,
    ElasticBlockOptions,
    decode,
    elastic_block,
)
from vllm_elastic.reference.canvas import Canvas


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("shape", ["mha", "gqa"])
def test_replaying_everything_is_no_cache(endless, shape, shift):
    """One block, no drift allowed: every step is thrown away and made again from the embedding."""
    model = endless(shape, vocab=40, shift=shift)
    for prompt in ([3, 1], [7, 7, 20, 11, 5]):
        options = ElasticBlockOptions(
            window=5, threshold=0.4, granularity=96, probes=1, block_drift=0.0, slack=0.0,
            refresh="replay",
        )  # fmt: skip
        block = elastic_block(model, prompt, 13, options)
        none = decode(model, prompt, 13, DecodingOptions(window=5, threshold=0.4))
        assert block.canvas_ids == none.canvas_ids
        commits = [p["committed"] for p in block.steps if p["committed"]]
        assert commits == [p["committed"] for p in none.steps]
        later = [(p["kind"], p["rows"]) for p in block.steps[1:]]
        assert later[1::2] == [("replay", len(none.canvas_ids))] * (none.denoising_steps - 1)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("lazy", [False, True])
def test_rows_of_a_step(endless, monkeypatch, lazy, shift):
    """The window's rows, what was committed with its neighbours, and the probes; then the rest."""
    model = endless("gqa", vocab=40, shift=shift)
    options = ElasticBlockOptions(
        window=6, threshold=0.5, granularity=4, probes=2, reach=1, block_drift=9.0, lazy_window=lazy
    )
    canvas = Canvas(model, [3, 1, 4], 20)
    decoder = ElasticBlock(model, canvas, options)
    decoder.step()
    widened = smaller = 0
    computed, run = [], decoder.run
    monkeypatch.setattr(
        decoder,
        "run",
        lambda join, wanted: computed.append((set(join), wanted)) or run(join, wanted),
    )
    while len(whole := canvas.window(6)):
        near = {p + by for p in decoder.committed for by in (-1, 0, 1)} & set(range(23))
        probes, seen = set(decoder.probes), dict(decoder.confidence)
        window = whole.tolist()
        if lazy:
            sure = sorted((p for p in window if seen.get(p, 0) >= 0.5), key=lambda p: -seen[p])
            window = [p for p in window if p not in seen or p in near or p in sure[:1]] or window
        passes = len(decoder.result.steps)
        computed.clear()
        decoder.step()
        made = decoder.result.steps[passes:]
        predicting = [p - shift for p in window]
        rows = {*predicting, *near, *probes}
        assert (made[0]["kind"], made[0]["rows"]) == ("window", len(rows))
        assert (computed[0][0], computed[0][1].tolist()) == (rows, predicting)
        if len(made) > 1:
            rest = [p - shift for p in whole.tolist() if p not in window]
            assert (made[1]["kind"], made[1]["rows"]) == ("widened", len(rest))
            assert (computed[1][0], computed[1][1].tolist()) == (set(rest), rest)
        predicted = whole.tolist() if len(made) > 1 else window
        assert all(decoder.confidence[p] != seen.get(p) for p in predicted)
        assert set(made[-1]["committed"]) <= set(predicted)
        # Nobody watches what was computed for its own sake.
        assert not set(decoder.probes) & rows
        widened, smaller = widened + len(made) - 1, smaller + (len(window) < len(whole))
    assert bool(widened and smaller) == lazy


@pytest.mark.parametrize("shift", [0, 1])
def test_first_step_watches_all_but_the_windows_rows(endless, shift):
    model = endless("mha", vocab=40, shift=shift)
    canvas = Canvas(model, [3], 6)
    decoder = ElasticBlock(model, canvas, ElasticBlockOptions(window=4, granularity=1, probes=99))
    decoder.step()  # predicts 1 to 4
    assert decoder.probes == [p for p in range(7) if not 1 - shift <= p <= 4 - shift]
