"""Policies by name."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from paec_kernels.train import checkpoint
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy
from paec_kernels.train.models.warm_start import warm_start


def pick_device(name: str) -> torch.device:
    """``auto`` is a GPU where there is one, under torchrun this process' own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def starting_policy(
    config: TrainConfig, device: torch.device, on_warm_step: Callable[[int, float], None] = lambda step, loss: None
) -> Policy:
    """What training starts from: ``tiny``, ``smollm2``, or a Hugging Face id or folder.

    Args:
        on_warm_step: as in ``warm_start``, by which the tiny model is made on first use.
    """
    if config.model == "tiny":
        return TinyPolicy(warm_start(config.warm_start, config.cache, on_warm_step).to(device))
    return _hugging_face(config.model, config.chat, device)


def trained_policy(run: Path, device: torch.device) -> Policy:
    """The last checkpoint of a training run, which reads its prompts as it did in training.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
    """
    state = checkpoint.read(run / "checkpoint.pt")
    config = json.loads((run / "config.json").read_text())
    policy: Policy
    if config["model"] == "tiny":
        policy = TinyPolicy(TinyModel().to(device))
    else:
        policy = _hugging_face(config["model"], config.get("chat"), device)  # a run may be older than the option
    policy.module.load_state_dict(state["model"])
    return policy


def _hugging_face(name: str, chat: bool | None, device: torch.device) -> Policy:
    from paec_kernels.train.models import (
        hugging_face,  # transformers takes seconds to import, and the tiny model needs none
    )

    on_bf16_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return hugging_face.load(name, device, chat=chat, sampling_dtype=torch.bfloat16 if on_bf16_gpu else None)
