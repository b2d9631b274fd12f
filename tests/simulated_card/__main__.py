# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.simulated_card MODULE [ARGUMENT...]``: run a module as on a card.

So that what a card is to run, ``bench card`` above all, does not end there at a wrong call. The
times that it prints are of the simulation.
"""

from __future__ import annotations

import runpy
import sys

from vllm_elastic.bench import pass_floor

measured_rates = pass_floor.measured_rates
# A card's products and copies would take this machine hours.
pass_floor.measured_rates = lambda dtype, device: measured_rates(dtype, "cpu")

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
