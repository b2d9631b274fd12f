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
            refresh="replay", measure_every=1,
        )  # fmt: skip
        block = elastic_block(model, prompt, 13, options)
        none = decode(model, prompt, 13, DecodingOptions(window=5, threshold=0.4))
        assert block.canvas_ids == none.canvas_ids
        commits = [p["committed"] for p in block.steps if p["committed"]]
        assert commits == [p["committed"] for p in none.steps]
        later = [(p["kind"], p["rows"]) for p in block.steps[1:]]
        assert later[1::2] == [("replay", len(none.canvas_ids))] * (none.denoising_steps - 1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("shift", [0, 1])
def test_rows_of_a_step(endless, monkeypatch, shift, every):
    """The window's rows, what was committed with its neighbours, and in every n-th step
    the probes."""
    model = endless("gqa", vocab=40, shift=shift)
    options = ElasticBlockOptions(
        window=6, threshold=0.5, granularity=4, probes=2, reach=1, block_drift=9.0,
        measure_every=every,
    )  # fmt: skip
    canvas = Canvas(model, [3, 1, 4], 20)
    decoder = ElasticBlock(model, canvas, options)
    decoder.step()
    computed, run = [], decoder.run
    monkeypatch.setattr(
        decoder,
        "run",
        lambda join, wanted: computed.append((set(join), wanted.tolist())) or run(join, wanted),
    )
    while len(window := canvas.window(6)):
        near = {p + by for p in decoder.committed for by in (-1, 0, 1)} & set(range(23))
        predicting = [p - shift for p in window.tolist()]
        passes = len(decoder.result.steps)
        probes = [] if passes % every else decoder.next_probes
        rows = {*predicting, *near, *probes}
        decoder.step()
        (made,) = decoder.result.steps[passes:]
        assert (made["kind"], made["rows"]) == ("window", len(rows))
        assert computed.pop() == (rows, predicting)
        assert set(made["committed"]) <= set(window.tolist())
        if passes % every == 0:
            assert probes, "nothing is probed"
            # Nobody watches what was computed for its own sake.
            assert not set(decoder.next_probes) & rows


@pytest.mark.parametrize("shift", [0, 1])
def test_first_step_watches_all_but_the_windows_rows(endless, shift):
    model = endless("mha", vocab=40, shift=shift)
    canvas = Canvas(model, [3], 6)
    decoder = ElasticBlock(model, canvas, ElasticBlockOptions(window=4, granularity=1, probes=99))
    decoder.step()  # predicts 1 to 4
    assert decoder.next_probes == [p for p in range(7) if not 1 - shift <= p <= 4 - shift]
