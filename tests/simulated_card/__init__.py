# SPDX-License-Identifier: Apache-2.0
"""A card that is not there: what CUDA builds of torch and vLLM would run, run on a CPU.

``pytest -p tests.simulated_card ...`` runs tests as on a card, those that need one too. It finds
what takes the wrong way on a GPU: a tensor on the host beside one on the card, a flag of vLLM's
CUDA platform, a method that its GPU worker calls, memory that a graph goes on reading. Kernels run
in Triton's interpreter or are torch's; speed, rounding and races are a card's alone. Not simulated:
experts and quantised layers, whose kernels CPU builds do not have, and several ranks.
"""

from __future__ import annotations

import os


def _install() -> None:
    # As tests/conftest.py does, which is read later than torch.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TRITON_INTERPRET", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process is the card's
    from tests.simulated_card import torch_cuda

    torch_cuda.install()
    from tests.simulated_card import vllm_cuda  # by now torch has a card

    vllm_cuda.install()


_install()
