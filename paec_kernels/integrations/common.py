"""What every integration does in the same way."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from paec_kernels.losses.paec import PAEC, Plan
from paec_kernels.saved_state import load_saved, write_saved

STATE_NAME = "paec.pt"  # in a trainer's checkpoint


def save_state(paec: PAEC, folder: str) -> None:
    """Write PAEC's state, whole or not at all, into a checkpoint's folder."""
    write_saved(Path(folder) / STATE_NAME, paec.state_dict())


def read_state(paec: PAEC, path: str | Path, remedy: str) -> dict[str, Any]:
    """Return what `save_state` wrote, once it is certain that ``paec.load_state_dict`` will take it; nothing changes.

    Args:
        remedy: a sentence that says what to do about another file.
    Raises:
        FileNotFoundError, UnreadableFileError: there is no such file, or it is no such state.
        RuntimeError: it is of another config.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing, which every complete checkpoint of a run with PAEC has. {remedy}")
    trial = PAEC(paec.config, steps_per_batch=paec.steps_per_batch)
    state = load_saved(path, "PAEC's state", remedy, fields=list(trial.state_dict()))
    try:
        trial.load_state_dict(state)
    except RuntimeError as error:
        raise RuntimeError(f"{path} does not fit: {error}. {remedy}") from error
    return state


def loss_scale(scaler: Any) -> float:
    """Return a gradient scaler's scale, which falls where it has an optimiser leave a step out; 1 without a scaler.

    Whether the optimiser was called does not tell: a fused one is called, and leaves the step out by itself.
    """
    return 1.0 if scaler is None else scaler.get_scale()


def numbers(plan: Plan, paec: PAEC) -> dict[str, float]:
    """Read PAEC's plan for a log, with the ``loss`` it makes, without what is NaN, as the anchor until it is set.

    Warns as ``PAEC.warn_unless_selective``.
    """
    values = plan._asdict() | {"loss": paec.loss_of(plan)}
    read = torch.stack(list(values.values())).tolist()  # one wait for the device
    found = {name: value for name, value in zip(values, read, strict=True) if value == value}
    if "threshold" in found:
        paec.warn_unless_selective(found["threshold"])
    return found


def sources_of_noise(model: nn.Module) -> list[str]:
    """Name what makes two passes over the same tokens differ: dropout, layer drop, jitter; as ``path.name=value``."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            is_noise = any(word in name for word in ("dropout", "layerdrop", "jitter"))
            is_noise |= name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if is_noise and isinstance(value, float) and value > 0:
                found.append(f"{path}.{name}={value}")
    return found
