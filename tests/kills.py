"""Kills a trainer at random moments, and holds what it left and how it goes on against a run that nobody disturbed.

A kill is SIGKILL: from outside after a random time, or by the process itself before a random line of what it runs while
it writes a checkpoint, say. After each, a copy of the folder is trained to the end, and the folder itself to the next
kill. What a kill left half written must be refused by an error that names it, or removed.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, ClassVar

import torch


class Trainer(ABC):
    """What is killed, in processes that are forked from this one after it has trained once, and so start at once."""

    AIMS: ClassVar[dict[CodeType, str]]  # when the process kills itself: while one of these functions runs
    MOMENTS: tuple[str, ...]  # of the kills, in turn; "time" is one from outside
    SAVED = r"saved (\d+)"  # what is said of a step that is saved
    undisturbed: Path  # the folder of the run that nobody disturbs, which is trained first

    @abstractmethod
    def train(self, folder: Path) -> None:
        """Go on from the folder's newest complete checkpoint to the end, and `say` which steps are saved."""

    @abstractmethod
    def newest(self, folder: Path) -> int:
        """Return the step of the newest complete checkpoint, 0 where there is none."""

    @abstractmethod
    def states(self, folder: Path) -> dict[str, Any]:
        """Return all that a finished run left, without what was measured."""

    @abstractmethod
    def leftovers(self, folder: Path) -> list[Path]:
        """Return what a kill left half written; `train` tries each by `try_leftover`, or removes it."""

    def steps_lost(self, folder: Path, saved: int) -> int:
        """Count the steps up to ``saved`` that the folder does not hold."""
        return max(0, saved - self.newest(folder))


@dataclass
class Kill:
    """A kill, and what came of it."""

    moment: str
    where: str  # seconds after the start, or the line
    folder: int  # the number of the folder, in which several kills may fall
    steps_said_saved: int  # in this folder, up to this kill
    steps_lost: int  # of those
    left: list["Leftover"]
    differing: list[str]  # from the undisturbed run, after the copy was trained to its end


@dataclass
class Leftover:
    """What this kill left half written, or an earlier one in the same folder, and what the copy made of it."""

    GOOD: ClassVar = ("refused by name", "removed", "accepted, whole")
    BAD: ClassVar = ("refused without its name", "accepted, damaged", "neither tried nor removed")

    name: str
    became: str  # one of the above
    error: str


class Lines:
    """Counts the lines that run in each call of what is aimed at; kills before the one that is chosen.

    Those of what it calls count down to ``DEEPEST``: far more run in the loops of libraries below, and do not matter.
    """

    DEEPEST = 4

    def __init__(self, aims: dict[CodeType, str], moment: str = "", call: int = 0, line: int = 0) -> None:
        self.calls: dict[str, list[int]] = {name: [] for name in aims.values()}
        self._aims, self._chosen = aims, (moment, call, line)
        self._root: FrameType | None = None

    def __call__(self, frame: FrameType, event: str, value: Any) -> Callable | None:
        if self._root is None:
            if event != "call" or frame.f_code not in self._aims:
                return None
            self._root = frame
            self.calls[self._aims[frame.f_code]].append(0)
        if event == "call" and self._too_deep(frame):
            return None
        moment = self._aims[self._root.f_code]
        counts = self.calls[moment]
        if event == "line":
            counts[-1] += 1
            if (moment, len(counts), counts[-1]) == self._chosen:
                path = Path(frame.f_code.co_filename)
                say(f"killed at {path.parent.name}/{path.name}:{frame.f_lineno}")
                os.kill(os.getpid(), signal.SIGKILL)
        elif event == "return" and frame is self._root:
            self._root = None
        return self

    def _too_deep(self, frame: FrameType | None) -> bool:
        for _ in range(self.DEEPEST + 1):
            if frame is self._root:
                return False
            frame = frame.f_back if frame else None
        return True


def say(text: str) -> None:
    """Write a line that a kill right after it does not take back."""
    os.write(1, f"\n{text}\n".encode())


def try_leftover(path: Path, load: Callable[[], Any], whole: bool = False) -> None:
    """Load what a kill left, and say what became of it; ``whole`` where nothing is missing but the mark that it is."""
    error = ""
    try:
        load()
    except Exception as refusal:
        error = str(refusal).replace("\n", " ")
        became = "refused by name" if str(path) in error else "refused without its name"
    else:
        became = "accepted, whole" if whole else "accepted, damaged"
    say(f"left {json.dumps([path.name, became, error])}")


def start(trainer: Trainer, folder: Path, output: Path, lines: Lines | None = None) -> int:
    """Train in a new process, which writes what it says into the file ``output``; return its number."""
    output.write_text("")
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
        sys.settrace(lines)
        trainer.train(folder)
        sys.settrace(None)
        status = 0
    except BaseException:
        say(traceback.format_exc())
    finally:
        os._exit(status)


def wait(process: int, seconds: float | None = None) -> int:
    """Return the process' status; kill it after so many seconds."""
    if seconds is not None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def leaves(state: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all that is in a state by dotted names, tensors as their type and bytes."""
    if isinstance(state, dict | list | tuple):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(state, torch.Tensor):
        yield name, (state.dtype, tuple(state.shape), state.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    else:
        yield name, repr(state)


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name what differs, to the bit, between two states."""
    found, expected = dict(leaves(one)), dict(leaves(other))
    return [name.removeprefix(".") for name in found | expected if found.get(name) != expected.get(name)]


def kill_often(trainer: Trainer, kills: int, seed: int, work: Path) -> list[Kill]:
    """Kill so many times, in the folder ``work``; the undisturbed run's is made there too."""
    rng = random.Random(seed)
    trainer.undisturbed, scratch, output = work / "undisturbed", work / "copy", work / "output"
    began, lines = time.monotonic(), Lines(trainer.AIMS)
    sys.settrace(lines)
    trainer.train(trainer.undisturbed)
    sys.settrace(None)
    seconds = time.monotonic() - began
    expected = trainer.states(trainer.undisturbed)

    found: list[Kill] = []
    folder, folders, text = work / "killed 1", 1, ""
    while len(found) < kills:
        moment = trainer.MOMENTS[len(found) % len(trainer.MOMENTS)]
        if moment == "time":
            after = rng.uniform(0, seconds)
            status, where = wait(start(trainer, folder, output), after), f"{after:.3f} s after the start"
        else:
            call = rng.randrange(len(lines.calls[moment]))
            killer = Lines(trainer.AIMS, moment, 1 + call, rng.randint(1, lines.calls[moment][call]))
            status, where = wait(start(trainer, folder, output, killer)), ""
        text += output.read_text()
        if status != -signal.SIGKILL:  # it was through before
            if status:
                raise RuntimeError(text)
            folders += 1
            folder, text = work / f"killed {folders}", ""
            continue
        where = where or re.findall(r"killed at (.*)", text)[-1]
        saved = max(map(int, re.findall(trainer.SAVED, text)), default=0)
        lost = trainer.steps_lost(folder, saved)
        left = trainer.leftovers(folder)
        shutil.rmtree(scratch, ignore_errors=True)
        if folder.exists():
            shutil.copytree(folder, scratch)
        ended = wait(start(trainer, scratch, output))
        said = output.read_text()
        if ended:
            raise RuntimeError(said)
        became = what_became([path.name for path in left], said, scratch)
        differs = differing(trainer.states(scratch), expected)
        found.append(Kill(moment, where, folders, saved, lost, became, differs))
        print(json.dumps(asdict(found[-1])), flush=True)
    return found


def what_became(left: list[str], said: str, folder: Path) -> list[Leftover]:
    """Return of each name that was left in a folder what `try_leftover` said, or whether it is gone by now."""
    tried = [json.loads(line) for line in re.findall(r"^left (.*)$", said, re.MULTILINE)]
    found = [Leftover(name, became, error.replace(str(folder), "")) for name, became, error in tried]
    for name in set(left) - {leftover.name for leftover in found}:
        found.append(Leftover(name, "neither tried nor removed" if (folder / name).exists() else "removed", ""))
    return found


def once_a_folder(kills: list[Kill], steps: str) -> int:
    """Sum the most of each folder: each later kill there puts the same steps to the test again."""
    most: Counter[int] = Counter()
    for kill in kills:
        most[kill.folder] = max(most[kill.folder], getattr(kill, steps))
    return most.total()


def summary(kills: list[Kill]) -> dict[str, Any]:
    left = Counter(leftover.became for kill in kills for leftover in kill.left)
    return {
        "kills": len(kills),
        "kills_by_moment": dict(Counter(kill.moment for kill in kills)),
        "steps_said_saved": once_a_folder(kills, "steps_said_saved"),
        "steps_lost_that_were_said_saved": once_a_folder(kills, "steps_lost"),
        "leftovers_met_by_resumes": {became: left[became] for became in (*Leftover.GOOD, *Leftover.BAD)},
        "resumes_equal_to_the_bit": sum(not kill.differing for kill in kills),
        "each": [asdict(kill) for kill in kills],
    }


def is_bad(record: dict[str, Any]) -> bool:
    return (
        record["steps_lost_that_were_said_saved"] > 0
        or record["resumes_equal_to_the_bit"] < record["kills"]
        or any(record["leftovers_met_by_resumes"][became] for became in Leftover.BAD)
    )


def kill_in_new_process(module: str, kills: int = 2) -> dict[str, Any]:
    """Run a module's `command` in a process of its own, which may fork, and return its summary."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, "--kills", str(kills)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout[done.stdout.rindex("\n{\n") :])


def command(
    trainer: Callable[[], Trainer],
    work: Path,
    description: str,
    packages: tuple[str, ...],
    measure: Callable[[Path], dict[str, Any]] = lambda folder: {},
) -> None:
    """Be the command around a trainer: ``--kills``, ``--seed`` and ``--out``, to whose record ``measure`` adds."""
    import argparse
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    record = {"seed": options.seed, **summary(kill_often(trainer(), options.kills, options.seed, work))}
    print(json.dumps({name: value for name, value in record.items() if name != "each"}, indent=1))
    if options.out:
        from benchmarks.provenance import provenance  # reads which files are loaded, so last
        from paec_kernels.saved_state import write_json

        versions = {package: version(package) for package in packages}
        write_json(options.out, provenance() | {"versions": versions} | measure(work / "measured") | record)
    sys.exit(is_bad(record))
