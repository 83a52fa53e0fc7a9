"""Token statistics from logits: the operator, its kernels and its torch path, one idea a file."""

from paec_kernels.token_stats.operator import token_stats

__all__ = ["token_stats"]
