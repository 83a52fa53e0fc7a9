"""The folder that ``--out`` names: one process at a time writes there, and whether it can is known before the work."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paec_kernels.losses.ranks import rank_and_world
from paec_kernels.saved_state import remove_partials

LOCK = ".lock"
_held: set[Path] = set()  # by this process


class FolderInUseError(ValueError):
    """Another process writes into the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder for this process while the block runs; make it where it is missing.

    The operating system lets go of it when the process dies, however it dies. What killed writers left unfinished is
    removed. In a folder that this process holds already, and on other ranks than the first, which write nothing, this
    does nothing.

    Raises:
        FolderInUseError: another process holds it; the message says which, by its number and machine.
        ValueError: it is no folder, or nothing can be written there.
    """
    place = folder.resolve()
    if place in _held or rank_and_world()[0] > 0:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = folder / LOCK
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(lock)
        except OSError as error:
            raise ValueError(f"out must be a folder to write to, got {folder}: {error.strerror}") from error
        _held.add(place)
        try:
            remove_partials(folder)
            yield
        finally:
            _held.discard(place)
            lock.unlink(missing_ok=True)  # while it is locked, so that nobody locks what is about to go
            os.close(descriptor)
    finally:
        for made in missing:  # those that nothing was written to
            with suppress(OSError):
                made.rmdir()


def _lock(path: Path) -> int:
    """Return the descriptor of the file, which is locked and says who holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            message = f"out must be a folder that nobody else writes to: {path.parent} is held by {holder}"
            raise FolderInUseError(message) from None
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # its holder has just let go, and the file is gone
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        path.unlink()
        os.close(descriptor)
        raise
    return descriptor
