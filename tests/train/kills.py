"""Kills `paec train` at random moments, and holds what it left and how it goes on against a run that nobody disturbed.

    python -m tests.train.kills --kills 20 --out bench_results/trust/kills_train.json

A kill is SIGKILL: from outside after a random time, or by the process itself before a random line of what it runs while
it starts, writes a row of the log, writes a checkpoint, or writes the evaluation. After each, a copy of the folder is
trained to the end, and the folder itself to the next kill.
"""

import argparse
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paec_kernels import cli
from paec_kernels.saved_state import write_json
from paec_kernels.train import out_folder, run_folder
from paec_kernels.train.report.evaluate import Evaluation

STEPS = 6
OPTIONS = (
    f"--steps {STEPS} --checkpoint-every 2 --tasks parity count --prompts 2 --answers 4 --max-new-tokens 8 "
    "--method.paec.anchor-steps 3 --evaluate.problems 3 --evaluate.samples 2 "
    "--warm-start.skill-steps 60 --warm-start.habit-steps 0 --warm-start.batch 16"
).split()
TIMES = ("seconds", "sample_seconds")
# Where the process kills itself: while one of these runs, and what it calls.
AIMS: dict[CodeType, str] = {
    out_folder._lock.__code__: "start",
    run_folder.RunLog.__init__.__code__: "start",
    run_folder.RunLog.write.__code__: "log",
    run_folder.RunLog.sync.__code__: "log",
    run_folder.save_checkpoint.__code__: "checkpoint",
    Evaluation.save.__code__: "evaluation",
}
KINDS = ("checkpoint", "log", "time", "start", "checkpoint", "log", "time", "evaluation")  # in turn


@dataclass
class Kill:
    kind: str
    where: str  # seconds after the start, or the line
    steps_said_saved: int
    steps_lost: int  # of those
    differing: list[str]  # from the undisturbed run, after the copy was trained to its end


class Lines:
    """Counts the lines that run in each call of what is aimed at; kills before the one that is chosen."""

    def __init__(self, kind: str = "", line: int = 0) -> None:
        self.calls: dict[str, list[int]] = {kind: [] for kind in AIMS.values()}
        self._kind, self._line, self._root = kind, line, None

    def __call__(self, frame: FrameType, event: str, value: Any) -> Callable | None:
        if self._root is None:
            if event != "call" or frame.f_code not in AIMS:
                return None
            self._root = frame
            self.calls[AIMS[frame.f_code]].append(0)
        counts = self.calls[AIMS[self._root.f_code]]
        if event == "line":
            counts[-1] += 1
            if AIMS[self._root.f_code] == self._kind and sum(counts) == self._line:
                path = Path(frame.f_code.co_filename)
                os.write(1, f"\nkilled at {path.parent.name}/{path.name}:{frame.f_lineno}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
        elif event == "return" and frame is self._root:
            self._root = None
        return self


def start(folder: Path, cache: Path, output: Path, lines: Lines | None = None) -> int:
    """Train in a new process, forked from this one, which has imported everything; return its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        for stream in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        sys.settrace(lines)
        cli.main(["train", "--out", str(folder), "--cache", str(cache), *OPTIONS])
    except SystemExit as ended:
        sys.settrace(None)
        status = ended.code
        if lines:
            output.with_suffix(".lines").write_text(json.dumps(lines.calls))
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
    """Yield all that is in a checkpoint by dotted names, tensors as their type and bytes."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in items:
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(state, torch.Tensor):
        yield name, (state.dtype, tuple(state.shape), state.numpy().tobytes())
    else:
        yield name, repr(state)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [{name: x for name, x in row.items() if name not in TIMES} for row in run_folder.read_rows(folder)]


def differing(folder: Path, undisturbed: Path) -> list[str]:
    """Name what differs, to the bit, between two finished runs, or is left over in the first."""
    found = []
    states = [dict(leaves(run_folder.read_checkpoint(run / run_folder.CHECKPOINT))) for run in (folder, undisturbed)]
    found += [f"checkpoint{name}" for name in states[0] | states[1] if states[0].get(name) != states[1].get(name)]
    found += ["log.jsonl"] if rows(folder) != rows(undisturbed) else []
    found += ["eval.json"] if (folder / "eval.json").read_bytes() != (undisturbed / "eval.json").read_bytes() else []
    configs = [json.loads((run / "config.json").read_text()) for run in (folder, undisturbed)]
    found += [f"config.json: {name}" for name in configs[1] if name != "out" and configs[0][name] != configs[1][name]]
    files, expected = ({path.name for path in run.iterdir()} for run in (folder, undisturbed))
    found += [f"left over: {name}" for name in sorted(files ^ expected)]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = run_folder.read_rows(folder)
    for name in logged[0].keys() - {"step"}:
        events = [(event.step, event.value) for event in board.Scalars(name)]
        numbers = [torch.tensor(float("nan") if row[name] is None else row[name]).item() for row in logged]
        if repr(events) != repr([*zip(range(1, STEPS + 1), numbers, strict=True)]):
            found.append(f"tensorboard: {name}")
    return found


def steps_lost(folder: Path, undisturbed: Path, said: int) -> int:
    """Count the steps up to ``said`` that the folder does not hold, in its checkpoint or in its log."""
    if said == 0:
        return 0
    try:
        done = run_folder.read_checkpoint(folder / run_folder.CHECKPOINT)["steps_done"]
    except (OSError, ValueError):
        return said
    kept, expected = rows(folder)[:said], rows(undisturbed)[:said]
    alike = [a == b for a, b in zip(kept, expected, strict=False)]
    return max(said - min(done, said), said - sum(alike))


def kill_often(kills: int, seed: int, work: Path) -> list[Kill]:
    """Kill so many times, in the folder ``work``; the undisturbed run's is made there too."""
    rng = random.Random(seed)
    cache, undisturbed, scratch = work / "cache", work / "undisturbed", work / "copy"
    if wait(start(undisturbed, cache, work / "undisturbed.out")):  # makes the start that the others read
        raise RuntimeError((work / "undisturbed.out").read_text())
    began = time.monotonic()
    wait(start(work / "traced", cache, work / "traced.out", Lines()))
    seconds = time.monotonic() - began
    calls = json.loads((work / "traced.lines").read_text())

    found: list[Kill] = []
    folder = output = None
    while len(found) < kills:
        if folder is None:
            folder = work / f"killed after {len(found)}"
            output = work / f"{folder.name}.out"
        kind = KINDS[len(found) % len(KINDS)]
        if kind == "time":
            after = rng.uniform(0, seconds)
            status, where = wait(start(folder, cache, output), after), f"{after:.3f} s after the start"
        else:
            some = rng.randint(1, len(calls[kind]))  # earlier calls more often, which leave something to go on with
            status = wait(start(folder, cache, output, Lines(kind, rng.randint(1, sum(calls[kind][:some])))))
            where = ""
        if status != -signal.SIGKILL:  # it was through before
            if status:
                raise RuntimeError(output.read_text())
            folder = None
            continue
        text = output.read_text()
        where = where or re.findall(r"killed at (.*)", text)[-1]
        said = max(map(int, re.findall(r"saved step (\d+)", text)), default=0)
        lost = steps_lost(folder, undisturbed, said)
        shutil.rmtree(scratch, ignore_errors=True)
        if folder.exists():
            shutil.copytree(folder, scratch)
        ended = wait(start(scratch, cache, work / "copy.out"))
        differs = [f"exit status {ended}"] if ended else differing(scratch, undisturbed)
        found.append(Kill(kind, where, said, lost, differs))
        print(*asdict(found[-1]).values(), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable()  # TensorBoard's reader tells of each row that was made again
    with tempfile.TemporaryDirectory() as work:
        kills = kill_often(options.kills, options.seed, Path(work))
    same = sum(not kill.differing for kill in kills)
    summary = {
        "kills": len(kills),
        "kills_by_moment": dict(Counter(kill.kind for kill in kills)),
        "steps_said_saved": sum(kill.steps_said_saved for kill in kills),
        "steps_lost_that_were_said_saved": sum(kill.steps_lost for kill in kills),
        "resumes_equal_to_the_bit": same,
    }
    print(json.dumps(summary, indent=1))
    if options.out:
        from benchmarks.provenance import provenance  # reads which files are loaded, so last

        write_json(options.out, provenance() | {"seed": options.seed, **summary, "each": [*map(asdict, kills)]})
    sys.exit(not (same == len(kills) and summary["steps_lost_that_were_said_saved"] == 0))


if __name__ == "__main__":
    main()
