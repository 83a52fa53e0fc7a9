"""What every integration does in the same way."""

from pathlib import Path

import torch
from torch import nn

from paec_kernels.losses.paec import PAEC, Plan
from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.saved_state import whole_file

STATE_NAME = "paec.pt"  # in a trainer's checkpoint


def save_state(paec: PAEC, folder: str) -> None:
    """Write PAEC's state, whole or not at all, into a checkpoint's folder."""
    with whole_file(Path(folder) / STATE_NAME) as partial:
        torch.save(paec.state_dict(), partial)


def load_state(paec: PAEC, path: str | Path) -> None:
    """Read what `save_state` wrote; RuntimeError for a state that is damaged or of another config."""
    paec.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))


def numbers(plan: Plan, config: PAECConfig) -> dict[str, float]:
    """Read the plan for a log, with the ``loss`` it makes, without what is NaN, as the anchor until it is set."""
    loss = config.lam * plan.penalty - config.beta * plan.mean_entropy
    values = plan._asdict() | {"loss": loss}
    read = torch.stack(list(values.values())).tolist()  # one wait for the device
    return {name: value for name, value in zip(values, read, strict=True) if value == value}


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
