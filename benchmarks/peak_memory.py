"""The high-water mark of a process's resident memory: whatever allocates, in any thread, is counted."""

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STATUS = Path("/proc/self/status")  # Linux's


def growth(run: Callable[[], object]) -> int:
    """Return how many bytes ``run`` raises the mark by. Memory that was freed but kept before it does not count.

    Nor do, on Linux, pages of files that are resident afterwards and were not before: of code that runs for the first
    time, or again after the system had reclaimed it.
    """
    with suppress(OSError):  # where there is no such file, the mark is that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the mark becomes what is resident now
    before, files = _high_water_bytes(), _file_bytes()
    run()
    return _high_water_bytes() - before - max(0, _file_bytes() - files)


def _high_water_bytes() -> int:
    if STATUS.exists():  # not ru_maxrss, which on Linux starts at the parent's
        return _status_bytes("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _file_bytes() -> int:
    return _status_bytes("RssFile") if STATUS.exists() else 0


def _status_bytes(field: str) -> int:
    return 1024 * next(int(line.split()[1]) for line in STATUS.open() if line.startswith(field))
