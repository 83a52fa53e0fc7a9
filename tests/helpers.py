"""What tests of several folders use."""

import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import Tensor


class Code:
    """A file that holds it asks to run code."""

    def __reduce__(self):
        return (print, ("code from a file was run",))


# What may have happened to a file that torch.save wrote
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "another file": lambda path: path.write_text('{"log_history": []}'),
    "another's state": lambda path: torch.save({"param_groups": []}, path),
    "code": lambda path: torch.save({"anchor_sum": Code()}, path),
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_ranks(n: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """Call ``work(rank, *arguments)``, which joins a process group, in n new processes; return what they return.

    They are forked from a process that has only imported torch, which takes longer than most of what they do.

    Args:
        work: of a module, which the new processes import.
        folder: where their results are passed, as ``torch.load(weights_only=True)`` takes them.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "triton", "pytest", "paec_kernels"])
    given = (n, work, free_port(), folder, arguments, dict(os.environ))
    torch.multiprocessing.start_processes(_rank, given, nprocs=n, start_method="forkserver")
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(n)]


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """Return the folder of this run that all workers of pytest-xdist have."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def on_ranks_once(n: int, work: Callable[..., Any], factory: pytest.TempPathFactory, *arguments: Any) -> list[Any]:
    """Do as `on_ranks`, once for all workers of pytest-xdist, of which several may take tests of one module."""
    folder = shared_folder(factory) / "-".join(map(str, (work.__module__, work.__name__, n, *arguments)))
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
            on_ranks(n, work, scratch, *arguments)
            scratch.rename(folder)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(n)]


def _rank(
    rank: int,
    n: int,
    work: Callable[..., Any],
    port: int,
    folder: Path,
    arguments: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ |= environment
    # As torchrun sets them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(n)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(work(rank, *arguments), folder / str(rank))
    # DistributedDataParallel must go first: the last to let go of gloo's threads can wait for them for ever.
    gc.collect()
    torch.distributed.destroy_process_group()


def relative_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The distance of all tensors together over the length of what was expected."""
    difference = sum((actual[name].double() - value).square().sum() for name, value in expected.items())
    return (difference / sum(value.square().sum() for value in expected.values())).sqrt().item()
