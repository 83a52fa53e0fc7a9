"""Entropy control for RL with verifiable rewards, from fused kernels."""

from paec_kernels import reference
from paec_kernels.reference import TokenStats
from paec_kernels.token_stats import token_stats

__all__ = ["TokenStats", "reference", "token_stats"]
