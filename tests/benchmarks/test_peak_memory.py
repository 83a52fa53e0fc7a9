"""The growth of resident memory, in which a thread of its own may allocate."""

import threading

import torch

from benchmarks import peak_memory


def test_peak_memory_is_what_is_held_at_once_in_any_thread():
    mib = 2**20

    def allocate() -> None:
        def one_after_the_other() -> None:
            torch.ones(100 * mib, dtype=torch.uint8)
            torch.ones(60 * mib, dtype=torch.uint8)

        thread = threading.Thread(target=one_after_the_other)
        thread.start()
        thread.join()

    assert 95 * mib < peak_memory.growth(allocate) < 110 * mib
