# SPDX-License-Identifier: Apache-2.0
"""Serve LLaDA, the masked-diffusion language models, with vLLM and Elastic-Cache.

Importing this package imports neither torch nor vLLM; ``vllm_elastic.plugin`` is what vLLM loads.
"""

__version__ = "0.1.0"
