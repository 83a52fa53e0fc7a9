"""Ranks as threads of one process: the collectives that the package calls, and nothing else."""

import copy
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from paec_kernels.losses import ranks


class Done:
    def wait(self) -> None: ...


class FakeDist:
    """Stands for ``torch.distributed`` in the n threads that `on_threads` starts."""

    ReduceOp = torch.distributed.ReduceOp
    ProcessGroup = torch.distributed.ProcessGroup

    def __init__(self, n: int) -> None:
        self.n, self.here = n, threading.local()
        self.barrier = threading.Barrier(n, timeout=600)
        self.turn = threading.Lock()  # one rank runs at a time: Triton's interpreter is not made for threads
        self.sent: list[Any] = [None] * n

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def get_rank(self, group: Any) -> int:
        return self.here.rank

    def get_world_size(self, group: Any) -> int:
        return self.n

    def exchange(self, x: Any) -> list[Any]:
        self.sent[self.here.rank] = copy.deepcopy(x)
        self.wait()
        received = list(self.sent)
        self.wait()
        return received

    def wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()

    def all_reduce(self, x: Tensor, op: Any = ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        received = torch.stack(self.exchange(x))
        x.copy_(received.amax(0) if op == self.ReduceOp.MAX else received.sum(0))
        return Done() if async_op else None

    def all_gather_object(self, objects: list[Any], x: Any, group: Any = None) -> None:
        objects[:] = self.exchange(x)

    def all_gather(self, parts: list[Tensor], x: Tensor, group: Any = None) -> None:
        for part, received in zip(parts, self.exchange(x), strict=True):
            part.copy_(received)


def on_threads(n: int, work: Callable[[int], Any], modules: Iterable[ModuleType] = (ranks,)) -> list[Any]:
    """Call ``work(rank)`` in n threads that are ranks of one group, and return what they return.

    Args:
        modules: those that call ``torch.distributed``, which they name ``dist``.
    """
    fake = FakeDist(n)

    def of_rank(rank: int) -> Any:
        fake.here.rank = rank
        try:
            with fake.turn:
                return work(rank)
        except BaseException:
            fake.barrier.abort()  # else the others would wait for it
            raise

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(n) as threads:
        for module in modules:
            patch.setattr(module, "dist", fake)
        return list(threads.map(of_rank, range(n)))
