# SPDX-License-Identifier: Apache-2.0
"""The most that a step can take, allocated once at start, so that vLLM can size the KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vllm_elastic.decoding.limits import StepLimits
from vllm_elastic.decoding.plan import PassKind, PassPlan
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.decoding.traits import DecodingTraits
from vllm_elastic.models.rows import MOST_FILLING, bucket
from vllm_elastic.runner.adapters import Adapters
from vllm_elastic.runner.head import Head, rows_at_once
from vllm_elastic.runner.statistics.memory import reading_bytes, saved_bytes, totals_bytes
from vllm_elastic.runner.upload import Upload


def trial_run(
    model: Any,
    traits: DecodingTraits,
    limits: StepLimits,
    max_num_seqs: int,
    canvas: int,
    upload: Upload,
    adapters: Adapters | None = None,
) -> None:
    """Hold, one after the other, what a step of all that the limits allow holds in its phases.

    What lasts from before the pass to its end (what the recorder keeps, the totals) is there all
    the time; beside it the layers, then the candidates, then the attention that is worked out.

    Args:
        max_num_seqs: requests that run at a time; canvas: positions of the longest one.
        adapters: None: the engine has none.
    """
    if traits.stores_input:  # images come before anything of the pass is held
        model.embed_multimodal(**model.largest_image())
    attention, weight = model.attention_layers[0], model.embed_tokens.weight

    def empty(num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, device=weight.device)

    sizes = attention.num_heads, attention.num_kv_heads, attention.head_size
    heads, _, head_dim = sizes
    saved = empty(
        saved_bytes(
            limits.saved_rows, traits.num_layers, heads, head_dim, model.width, weight.itemsize
        )
    )
    totals = empty(totals_bytes(max_num_seqs, canvas, traits.num_layers))
    if canvas > limits.rows:
        # vLLM's experts keep scratch for the most rows that they have seen, and graphs go on
        # pointing to it: it must have its size before. The last chunk is the one that is filled up.
        most = limits.rows + MOST_FILLING
        model.run_without_cache(most, 0, most)
    # A canvas beyond the row budget is computed alone, chunk by chunk.
    num_rows = max(limits.rows, canvas)
    num_tested = min(num_rows, limits.saved_rows // 4)
    of_rows = None
    if adapters is not None:
        of_rows = adapters.of_trial(bucket(num_rows + num_tested))
    hidden = model.run_without_cache(num_rows, num_tested, limits.rows, of_rows)
    _predict_everything(model, traits, hidden, num_rows, upload)
    del hidden
    empty(reading_bytes(canvas, *sizes))
    del saved, totals


def _predict_everything(
    model: Any, traits: DecodingTraits, hidden: torch.Tensor, num_rows: int, upload: Upload
) -> None:
    """The head for a request that wants all that takes memory; of the rows' adapters, what the
    layers used last.

    As many rows as it takes at a time: thousands, sampled, would take longer and no more memory.
    """
    num_rows = min(num_rows, rows_at_once(traits.vocab_size))
    window = np.arange(num_rows, dtype=np.int32)
    # On a GPU a kernel draws, and the entropies are what takes most.
    wishes = Sampling(temperature=1.0, top_p=0.9, entropies=True, num_logprobs=1)
    plan = PassPlan("", PassKind.FIRST, 0, [], window, window, sampling=wishes)
    upload.start()
    head = Head([plan], traits, upload)
    upload.send()
    head.predict(model, hidden[:num_rows])
