# SPDX-License-Identifier: Apache-2.0
"""Attention statistics of a pass: what is saved while it runs, and what comes of it."""
