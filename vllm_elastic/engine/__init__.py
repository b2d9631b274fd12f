# SPDX-License-Identifier: Apache-2.0
"""vLLM's side: what it is told at start, its scheduler and worker, the meaning of its requests."""
