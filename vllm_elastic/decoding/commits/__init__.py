# SPDX-License-Identifier: Apache-2.0
"""Commit rules by name. A rule is one small file with one class, listed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_elastic.decoding.commits.base import CommitRule
from vllm_elastic.decoding.commits.credit import Credit
from vllm_elastic.decoding.commits.entropy import Entropy
from vllm_elastic.decoding.commits.factor import Factor
from vllm_elastic.decoding.commits.frechet import Frechet
from vllm_elastic.decoding.commits.frontier import Frontier
from vllm_elastic.decoding.commits.local import Local
from vllm_elastic.decoding.commits.steady import Steady
from vllm_elastic.decoding.commits.threshold import Threshold

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig

COMMIT_RULES: dict[str, type[CommitRule]] = {
    rule.name: rule
    for rule in (Threshold, Frontier, Steady, Credit, Factor, Frechet, Local, Entropy)
}


def make_commit_rule(config: ElasticConfig) -> CommitRule:
    """One request's rule, as ``config.commit`` names it (checked when the config was made)."""
    return COMMIT_RULES[config.commit](config)


__all__ = ["COMMIT_RULES", "CommitRule", "make_commit_rule"]
