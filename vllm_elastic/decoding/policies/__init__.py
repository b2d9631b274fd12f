# SPDX-License-Identifier: Apache-2.0
"""Refresh policies by name. A policy is one small file with one class, listed here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_elastic.decoding.policies.base import RefreshPolicy
from vllm_elastic.decoding.policies.dual_cache import DualCache
from vllm_elastic.decoding.policies.elastic import Elastic
from vllm_elastic.decoding.policies.elastic_block import ElasticBlock
from vllm_elastic.decoding.policies.interval import Interval
from vllm_elastic.decoding.policies.recompute import Recompute

if TYPE_CHECKING:
    from vllm_elastic.config import ElasticConfig

POLICIES: dict[str, type[RefreshPolicy]] = {
    policy.name: policy for policy in (Recompute, DualCache, Interval, Elastic, ElasticBlock)
}


def make_policy(config: ElasticConfig) -> RefreshPolicy:
    """The policy that ``config.policy`` names (checked when the config was made)."""
    return POLICIES[config.policy](config)


__all__ = ["POLICIES", "RefreshPolicy", "make_policy"]
