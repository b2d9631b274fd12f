# SPDX-License-Identifier: Apache-2.0
"""What stock vLLM lacks: one module for each record of the same name in the top-level patches/, and
``wrapping``, which they share."""
