"""What the import of an optional package says where the package is missing."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import in this context what ``pip install paec-kernels[name]`` brings.

    Raises:
        ModuleNotFoundError: a package is missing; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        message = f"{error.msg}; it comes with: pip install 'paec-kernels[{name}]'"
        raise ModuleNotFoundError(message, name=error.name) from error
