# SPDX-License-Identifier: Apache-2.0
"""Serve masked-diffusion language models (LLaDA, Dream, ...) with vLLM, over a cache that is
refreshed where it has drifted.

Importing this package imports neither torch nor vLLM; ``vllm_elastic.plugin`` is what vLLM loads.
"""

__version__ = "0.1.0"
