"""The high-water mark of a process's resident memory: whatever allocates, in any thread, is counted."""

import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def growth(run: Callable[[], object]) -> int:
    """Return how many bytes ``run`` raises the mark by. Memory that was freed but kept before it does not count."""
    with suppress(OSError):  # where there is no such file, the mark is that of the whole process so far
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the mark becomes what is resident now
    before = high_water_bytes()
    run()
    return high_water_bytes() - before


def high_water_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # not ru_maxrss, which on Linux starts at the parent's
        return 1024 * next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
