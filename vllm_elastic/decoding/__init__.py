# SPDX-License-Identifier: Apache-2.0
"""Decoding as pure bookkeeping: canvas, plans, block validity, commits, refresh policies.

Pure Python and numpy. Imports neither torch nor vLLM, so that it is tested by itself and the
simulator can run on it; what a pass computes comes in as a ``PassResult``.
"""
