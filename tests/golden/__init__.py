# SPDX-License-Identifier: Apache-2.0
"""Cases worked out by hand from what is published, as plain numbers. Nothing here imports code.

Both the oracle's tests and the engine's read them, so that the two cannot be wrong together.
"""
