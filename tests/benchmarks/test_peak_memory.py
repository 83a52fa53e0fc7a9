"""The growth of resident memory, in which a thread of its own may allocate."""

import mmap
import threading
from pathlib import Path

import pytest
import torch

from benchmarks import peak_memory

MIB = 2**20


def test_peak_memory_is_what_is_held_at_once_in_any_thread():
    def allocate() -> None:
        def one_after_the_other() -> None:
            torch.ones(100 * MIB, dtype=torch.uint8)
            torch.ones(60 * MIB, dtype=torch.uint8)

        thread = threading.Thread(target=one_after_the_other)
        thread.start()
        thread.join()

    assert 95 * MIB < peak_memory.growth(allocate) < 110 * MIB


@pytest.mark.skipif(not peak_memory.STATUS.exists(), reason="needs Linux's count of resident pages of files")
def test_code_that_the_system_reclaimed_is_not_counted():
    """A library that is resident again is no memory of the run's."""
    library = max((Path(torch.__file__).parent / "lib").iterdir(), key=lambda path: path.stat().st_size)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 64 * MIB, prot=mmap.PROT_READ) as code:

        def read_and_allocate() -> None:
            sum(code[:: mmap.PAGESIZE])  # touches each page
            torch.ones(100 * MIB, dtype=torch.uint8)

        assert 95 * MIB < peak_memory.growth(read_and_allocate) < 110 * MIB
