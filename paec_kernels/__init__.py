"""Entropy control for RL with verifiable rewards, from fused kernels."""

from paec_kernels import reference
from paec_kernels.calibration import PAEC, PAECConfig
from paec_kernels.entropy_losses import AER, SIREN, AERConfig, GlobalEntropy, GlobalEntropyConfig, SIRENConfig
from paec_kernels.linear_token_stats import linear_token_stats
from paec_kernels.loss import PAECLoss
from paec_kernels.one_pass import one_pass_loss
from paec_kernels.policy_losses import (
    cispo_loss,
    clip_cov_loss,
    clip_cov_selection,
    group_advantages,
    grpo_loss,
    kl_cov_loss,
    kl_cov_selection,
)
from paec_kernels.reference import TokenStats
from paec_kernels.token_stats import token_stats

__all__ = [
    "AER",
    "PAEC",
    "SIREN",
    "AERConfig",
    "GlobalEntropy",
    "GlobalEntropyConfig",
    "PAECConfig",
    "PAECLoss",
    "SIRENConfig",
    "TokenStats",
    "cispo_loss",
    "clip_cov_loss",
    "clip_cov_selection",
    "group_advantages",
    "grpo_loss",
    "kl_cov_loss",
    "kl_cov_selection",
    "linear_token_stats",
    "one_pass_loss",
    "reference",
    "token_stats",
]
