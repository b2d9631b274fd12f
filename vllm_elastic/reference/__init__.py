# SPDX-License-Identifier: Apache-2.0
"""The oracle: LLaDA and its decoders in plain PyTorch, to be checked by eye. No vLLM.

    from vllm_elastic.reference import LLaDA, ElasticOptions, elastic_cache

    model = LLaDA.from_pretrained(directory)        # or LLaDA.random(config, seed=0)
    result = elastic_cache(model, prompt_ids, max_tokens, ElasticOptions(gamma=0.9))
    result.token_ids, result.steps, result.row_layers / result.full_row_layers

Every decoder is ``decoder(model, prompt_ids, max_tokens, options) -> DecodingResult``:

    decode          DecodingOptions(window=16, threshold=0.9, tokens_per_step=None)
    elastic_cache   ElasticOptions(..., gamma=0.9, track_num=1, statistic="released")
    elastic_block   ElasticBlockOptions(..., granularity=32, probes=8, measure_every=4,
                    reach=4, block_drift=0.05, slack=0.1, attention_stride=4)
    interval        IntervalOptions(..., interval=8)
    dual_cache      DualCacheOptions(block_length=32, threshold=0.9, tokens_per_step=None)
    low_confidence  LowConfidenceOptions(steps=128, block_length=32)
    diffusion       DiffusionOptions(steps, alg="entropy", alg_temp=0.0, temperature=0.0, ...)

All but the last two take a commit rule: ``commit="threshold"``, "frontier", "factor", "frechet",
"local" or "entropy".

``LLaDAConfig(logits_shift=1)`` makes a model whose position m is predicted from row m - 1.
One request at a time; temperature 0 but for ``diffusion``, which is given its random numbers. An
engine is to agree with it token for token, pass for pass in float32; in bfloat16 rounding decides
near ties, and it need not. The same holds for a gamma within rounding (1e-6) of a similarity,
gamma = 1 above all.
"""

from .config import LLaDAConfig
from .decoding import DecodingOptions, decode
from .diffusion import DiffusionOptions, diffusion
from .dual_cache import DualCacheOptions, dual_cache
from .elastic_block import ElasticBlock, ElasticBlockOptions, elastic_block
from .elastic_cache import ElasticCache, ElasticOptions, elastic_cache
from .interval import IntervalOptions, interval
from .llada import LLaDA
from .low_confidence import LowConfidenceOptions, low_confidence
from .result import DecodingResult, Pass

__all__ = [
    "DecodingOptions",
    "DecodingResult",
    "DiffusionOptions",
    "DualCacheOptions",
    "ElasticBlock",
    "ElasticBlockOptions",
    "ElasticCache",
    "ElasticOptions",
    "IntervalOptions",
    "LLaDA",
    "LLaDAConfig",
    "LowConfidenceOptions",
    "Pass",
    "decode",
    "diffusion",
    "dual_cache",
    "elastic_block",
    "elastic_cache",
    "interval",
    "low_confidence",
]
