"""What makes two passes over the same tokens differ."""

from torch import nn


def sources_of_noise(model: nn.Module) -> list[str]:
    """Dropout, layer drop and jitter that are on, each as ``path.name=value``."""
    found = []
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            is_noise = any(word in name for word in ("dropout", "layerdrop", "jitter"))
            is_noise |= name == "p" and isinstance(module, nn.modules.dropout._DropoutNd)
            if is_noise and isinstance(value, float) and value > 0:
                found.append(f"{path}.{name}={value}")
    return found
