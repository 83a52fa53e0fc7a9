"""What tests of several folders use."""

import socket

from torch import Tensor


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all tensors together over the length of what was expected."""
    difference = sum((actual[name].double() - value).square().sum() for name, value in expected.items())
    return (difference / sum(value.square().sum() for value in expected.values())).sqrt().item()
