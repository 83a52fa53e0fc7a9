"""Entropy control for RL with verifiable rewards, from fused kernels."""

from paec_kernels import reference
from paec_kernels.losses.covariance import clip_cov_selection, kl_cov_selection
from paec_kernels.losses.drop_in import PAECLoss
from paec_kernels.losses.paec import PAEC
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.losses.policy import (
    cispo_loss,
    clip_cov_loss,
    group_advantages,
    grpo_loss,
    kl_cov_loss,
)
from paec_kernels.losses.rivals import AER, SIREN, AERConfig, GlobalEntropy, GlobalEntropyConfig, SIRENConfig
from paec_kernels.ops.linear import linear_token_stats
from paec_kernels.ops.one_pass import one_pass_loss
from paec_kernels.ops.operator import token_stats
from paec_kernels.types import TokenStats

__version__ = "0.1.0"

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
