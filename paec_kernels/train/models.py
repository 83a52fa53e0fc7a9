"""Policies by name."""

import torch

from paec_kernels.train.config import TrainConfig
from paec_kernels.train.policy import Policy
from paec_kernels.train.tiny_model import TinyPolicy
from paec_kernels.train.warm_start import warm_start


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def load_policy(config: TrainConfig, device: torch.device) -> Policy:
    """``tiny`` (made and cached on first use), ``smollm2``, or a Hugging Face id or folder."""
    if config.model == "tiny":
        return TinyPolicy(warm_start(config.warm_start, config.cache).to(device))
    raise ValueError(f"model must be tiny, got {config.model!r}")
