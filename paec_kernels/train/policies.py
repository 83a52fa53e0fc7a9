"""Policies by name."""

from collections.abc import Callable
from pathlib import Path

import torch

from paec_kernels.saved_state import ADDED, whole_folder
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy
from paec_kernels.train.models.warm_start import warm_start
from paec_kernels.train.run_folder import CHECKPOINT, fitting, read_checkpoint, read_config


def pick_device(name: str) -> torch.device:
    """Return the device of that name; ``auto`` is a GPU if there is one, under torchrun this process' own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type that forward passes are cast to, in sampling as in training, or None for the weights' own."""
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if precision == "bfloat16" or (precision == "auto" and has_bfloat16) else None


def starting_policy(
    config: TrainConfig, device: torch.device, on_warm_step: Callable[[int, float], None] = lambda step, loss: None
) -> Policy:
    """Return what training starts from: ``tiny``, ``smollm2``, or a Hugging Face id or folder.

    Args:
        on_warm_step: as in ``warm_start``, by which the tiny model is made on first use.
    """
    if config.model == "tiny":
        start = config.warm_start.for_tasks(config.tasks)
        return TinyPolicy(warm_start(start, config.cache, on_warm_step).to(device))
    return _hugging_face(config.model, config.chat, config.precision, device)


def trained_policy(run: Path, device: torch.device) -> Policy:
    """Return the last checkpoint of a training run, which reads its prompts as it did in training.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        UnreadableFileError: the checkpoint or config.json is damaged; the message names it.
    """
    state = read_checkpoint(run / CHECKPOINT)
    config = read_config(run, ["model", "chat", "precision", "warm_start"])
    if config["model"] == "tiny":
        start = ADDED | config["warm_start"]
        policy: Policy = TinyPolicy(TinyModel(start["width"], start["layers"]).to(device))
    else:
        policy = _hugging_face(config["model"], config["chat"], config["precision"], device)
    with fitting(run / CHECKPOINT):
        policy.module.load_state_dict(state["model"])
    return policy


def save_pretrained(policy: Policy, folder: Path) -> bool:
    """Write a Hugging Face model with its tokenizer, as ``from_pretrained`` reads them, whole or not at all.

    Returns:
        whether there was something to write: False for the tiny model, which from_pretrained could not read.
    """
    if isinstance(policy, TinyPolicy):
        return False
    with whole_folder(folder) as partial:
        policy.save_pretrained(partial)  # type: ignore[attr-defined]
    return True


def _hugging_face(name: str, chat: bool | None, precision: str, device: torch.device) -> Policy:
    # Imported where it is needed: transformers takes seconds, and the tiny model needs none of it.
    from paec_kernels.train.models import hugging_face

    return hugging_face.load(name, device, chat=chat, sampling_dtype=autocast_dtype(precision, device))
