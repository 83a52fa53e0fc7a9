"""What every integration does in the same way."""

import torch
from torch import nn

from paec_kernels.losses.paec import Plan
from paec_kernels.losses.paec_config import PAECConfig


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
