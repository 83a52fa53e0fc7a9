"""Verifiers in a process of their own, so that no answer can hang, bloat or end the training.

Works in any thread, where the timeouts of signals do not. A grading process starts with its first answer, and ends with
the process that uses it.
"""

import atexit
import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, Literal

SECONDS = 5.0  # of processor time, and six times as many on the clock, for a call; an answer takes one or two
LENGTH = 10_000  # characters of an answer: a longer one is not graded
TEXT = 100_000  # characters: of a longer response only the end is read

_SCRIPT = Path(__file__).with_name("grader_process.py")


class GaveUp(Exception):
    """The verifier could not tell."""


class Grader:
    """Calls the functions of a verifier in a process of its own; see `grader_process`.

    A call that takes longer than ``seconds`` or too much memory, or in which the process dies, raises `GaveUp`, and the
    next gets a new process.

    Args:
        verifier: ``"math"`` or ``"gym"``.
        seconds: for each call, of processor time, and six times as many on the clock. A new process takes about one
            more to start.
    """

    def __init__(self, verifier: Literal["math", "gym"], seconds: float = SECONDS) -> None:
        self._command = [sys.executable, "-P", str(_SCRIPT), verifier, str(seconds)]
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.given_up = 0
        """How many answers could not be graded."""
        os.register_at_fork(after_in_child=self._forget)
        atexit.register(self.close)

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Return what the function gives.

        Raises:
            GaveUp: it could not tell.
            ImportError: the verifier's library is not installed.
        """
        with self._lock:
            try:
                reply = self._ask((function, arguments))
            except BaseException:  # interrupted: the reply to this request must not be taken for that to the next
                self.close()
                raise
        if reply["error"] is not None:
            raise GaveUp(reply["error"])
        return reply["value"]

    def start(self) -> None:
        """Start the process unless it runs; ImportError as a call."""
        with self._lock:
            self._make_sure_it_runs()

    def give_up(self, answer: str | None, why: object) -> None:
        """Count an answer that is not graded, and warn at the first, the second, the fourth and so on."""
        with self._lock:
            self.given_up += 1
            count = self.given_up
        if count & (count - 1) == 0:
            warnings.warn(
                f"answers that could not be graded, and count as wrong or as different from others: {count} so far in "
                f"this process; the last is {str(answer)[:60]!r}: {why}",
                stacklevel=3,
            )

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _ask(self, request: Any) -> dict[str, Any]:
        self._make_sure_it_runs()
        try:
            self._send(request)
        except BrokenPipeError:  # it was killed between two requests, which says nothing of this one
            self.close()
            self._make_sure_it_runs()
            self._send(request)
        try:
            return self._receive()
        except EOFError:
            self.close()
            raise GaveUp(f"it takes more than {self._seconds:g} s or too much memory") from None

    def _make_sure_it_runs(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        # A session of its own: Ctrl-C is the parent's to handle.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            error = self._receive()["error"]
        except EOFError:
            error = f"the process ended with {self._process.wait()}: {' '.join(self._command)}"
        if error is not None:
            raise ImportError(f"the grading process cannot start: {error}")

    def _send(self, request: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EOFError
        return json.loads(line)

    def _forget(self) -> None:
        """A forked process leaves the grading process, and the lock that a thread may have held, to its parent."""
        self._lock = threading.Lock()
        self._inherited, self._process = self._process, None
