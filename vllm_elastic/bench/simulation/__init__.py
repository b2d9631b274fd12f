# SPDX-License-Identifier: Apache-2.0
"""Recorded requests replayed on a virtual clock: no model, no torch, no vLLM.

``recording`` turns run files into the work of every pass, ``cost_model`` and ``device`` say how
long a step of such passes takes, ``replica`` is one engine, ``cluster`` is many behind a router.
Only ``calibration`` starts the real engine.
"""
