"""Plant each fault in a copy of the last commit, run tests, and write down which test noticed it, or that none did.

    PYTHONPATH=tests .venv/bin/python -m mutants.run [--only NAME ...]

The named tests must pass first without any fault. A fault that they do not notice then meets all tests. Tests that run
out of time, or whose process crashes, have noticed; those that are killed, as where memory runs out, have not. Where
one of several processes dies, what its test does alone decides. A fault that keeps tests from being collected is none,
and neither is one that is noticed by a test which fails without it.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from mutants.faults import FAULTS, Fault

from benchmarks.provenance import provenance
from paec_kernels.saved_state import write_json

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "bench_results" / "trust" / "mutants.json"
ALL_TESTS = {".venv": "tests", ".venv-verl": "tests/integrations_verl"}
NOTICED = ("caught", "hangs", "crashes")
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT)
RUN_SECONDS = 3600
MESSAGE_LENGTH = 200


class Outcome(NamedTuple):
    """What a run of pytest came to."""

    verdict: str  # one of NOTICED, "survives" where all passed, or "void" where none ran or it was killed
    test: str | None  # the first that failed
    message: str | None  # what it said, or the signal that ended the process
    output: str


def run_pytest(tree: Path, venv: str, *arguments: str) -> Outcome:
    """Run tests of a tree on that tree's package."""
    command = [str(ROOT / venv / "bin" / "python"), "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *arguments]
    # No bytecode, from which a file that changes twice in a second would be taken. Wide, so that no id is cut.
    settings = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "1000"}
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        message = f"still running after {RUN_SECONDS} s"
        return Outcome("hangs", None, message, message)
    finally:
        with contextlib.suppress(ProcessLookupError):  # what a test has left behind
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode in (0, 5):  # 5: no test has the mark
        return Outcome("survives", None, None, output)
    if process.returncode < 0:
        ended_by = signal.Signals(-process.returncode)
        return Outcome("crashes" if ended_by in CRASHES else "void", None, ended_by.name, output)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - (.*))?$", output, re.MULTILINE)
    if failed is None:
        return Outcome("void", None, None, output)
    test, message = failed.groups(default="")
    if message.startswith("worker '"):  # one of pytest-xdist has died, which does not say by what signal
        alone = run_pytest(tree, venv, test)
        return alone._replace(test=test, verdict="void" if alone.verdict == "survives" else alone.verdict)
    verdict = "hangs" if message.startswith("Failed: Timeout") else "caught"
    return Outcome(verdict, test, message[:MESSAGE_LENGTH], output)


def named(faults: Iterable[Fault]) -> list[str]:
    """Return the tests that the faults name, each once, as pytest takes them."""
    return sorted({f"tests/{path}" for fault in faults for path in fault.tests.split(", ")})


@contextlib.contextmanager
def planted(tree: Path, fault: Fault) -> Iterator[None]:
    """Plant a fault in the tree's package, and take it out again."""
    path = tree / "paec_kernels" / fault.file
    text = path.read_text()
    path.write_text(text.replace(fault.old, fault.new))
    try:
        yield
    finally:
        path.write_text(text)


def attempt(tree: Path, fault: Fault, *arguments: str) -> dict[str, Any]:
    """Run tests with a fault, up to the first that notices it; return a row of the report."""
    began = time.monotonic()
    with planted(tree, fault):
        outcome = run_pytest(tree, fault.venv, "-x", *arguments)
    seconds = round(time.monotonic() - began, 1)
    print(f"{outcome.verdict:8} {seconds:6.1f} s  {fault.name}: {outcome.test or '-'}", flush=True)
    if outcome.verdict == "void":
        print(outcome.output[-3000:], flush=True)
    row = {"fault": fault.name, "file": fault.file, "verdict": outcome.verdict, "caught_by": outcome.test}
    return row | {"message": outcome.message, "seconds": seconds, "commit": provenance()["commit"]}


def attempt_all(tree: Path, fault: Fault, jobs: int) -> dict[str, Any]:
    """Run all tests with a fault, the slow ones last."""
    for marked in ("not slow", "slow"):
        row = attempt(tree, fault, "-n", str(jobs), "-m", marked, ALL_TESTS[fault.venv])
        if row["verdict"] != "survives":
            break
    if row["caught_by"] and run_pytest(tree, fault.venv, row["caught_by"]).verdict != "survives":
        row["verdict"] = "void"  # that test fails without it, too
    return row


def write_report(rows: dict[str, dict[str, Any]]) -> None:
    """Write the rows with their counts, in the order of the list; whole or not at all.

    Rows may be of several runs, so the commit stands in each row alone, and the seconds are the sum of all.
    """
    ordered = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    verdicts = Counter(row["verdict"] for row in ordered)
    missed = [row["fault"] for row in ordered if row["verdict"] not in NOTICED]
    counts = {"faults": len(FAULTS), "noticed": len(ordered) - len(missed), "verdicts": verdicts, "missed": missed}
    head = {name: value for name, value in provenance().items() if name not in ("command", "commit")}
    write_json(REPORT, {**head, **counts, "seconds": round(sum(row["seconds"] for row in ordered)), "rows": ordered})


def main() -> None:
    parser = argparse.ArgumentParser(prog="mutants.run", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="try these; the rows of others in the report stay")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="faults that are tried at a time")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only is None or fault.name in options.only]
    if unknown := set(options.only or ()) - {fault.name for fault in faults}:
        sys.exit(f"no such fault: {', '.join(sorted(unknown))}")
    changed = ["git", "status", "--porcelain", "paec_kernels", "tests"]
    if subprocess.run(changed, cwd=ROOT, capture_output=True, check=True).stdout:
        sys.exit("paec_kernels or tests have changes, and faults are planted in copies of the last commit")
    rows = {}
    if options.only and REPORT.exists():
        rows = {row["fault"]: row for row in json.loads(REPORT.read_text())["rows"]}

    began = time.monotonic()
    pool = ThreadPoolExecutor(options.jobs)
    with tempfile.TemporaryDirectory() as folder:
        trees: SimpleQueue[Path] = SimpleQueue()
        for i in range(options.jobs):
            tree = Path(folder) / str(i)
            subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, tree], check=True)
            trees.put(tree)
        for venv in sorted({fault.venv for fault in faults}):
            tests = named(fault for fault in faults if fault.venv == venv)
            control = run_pytest(tree, venv, "-n", str(options.jobs), *tests)
            if control.verdict != "survives":
                sys.exit(f"void: without any fault these fail\n{control.output[-3000:]}")
        print(f"without any fault the named tests pass, {time.monotonic() - began:.0f} s", flush=True)

        def first_attempt(fault: Fault) -> dict[str, Any]:
            tree = trees.get()
            try:
                return attempt(tree, fault, *named([fault]))
            finally:
                trees.put(tree)

        try:
            for tried in as_completed([pool.submit(first_attempt, fault) for fault in faults]):
                row = tried.result()
                rows[row["fault"]] = row
                write_report(rows)
        finally:
            pool.shutdown(cancel_futures=True)
        for fault in faults:
            if rows[fault.name]["verdict"] == "survives":
                rows[fault.name] = attempt_all(tree, fault, options.jobs)
                write_report(rows)
    missed = [fault.name for fault in faults if rows[fault.name]["verdict"] not in NOTICED]
    print(f"{len(faults) - len(missed)} of {len(faults)} noticed, {time.monotonic() - began:.0f} s")
    if missed:
        sys.exit(f"not noticed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
