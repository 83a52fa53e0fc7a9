"""The grading process: hostile answers end it and not its parent, in any thread, and none of them is run."""

import os
import resource
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run

import pytest

pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.train.tasks import grader_process
from paec_kernels.train.tasks.grader import GaveUp, Grader

ONE = r"\boxed{1}"
SECONDS = 0.5
SLACK = 30.0  # seconds to start a process on a busy machine
SLOW = [r"\boxed{1000000000!}", rf"\boxed{{{'1+' * 20_000}1}}"]
TASKS = Path(grader_process.__file__).parent


@pytest.fixture(scope="module")
def grader() -> Grader:
    return Grader("math", SECONDS)


def is_right(grader: Grader, text: str, expected: str = ONE) -> bool | None:
    """None where it gave up."""
    try:
        return grader("is_right", expected, text)
    except GaveUp:
        return None


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{10^{10^{10}}}",  # one operation, which no signal's handler interrupts
        rf"\boxed{{{'{' * 1000}1{'}' * 1000}}}",
        *(pytest.param(text, marks=pytest.mark.slow) for text in SLOW),
    ],
    ids=range(2 + len(SLOW)),
)
def test_a_hostile_answer_ends_in_time(grader: Grader, text: str) -> None:
    start = time.perf_counter()
    assert is_right(grader, text) is None
    assert time.perf_counter() - start < SECONDS + SLACK
    assert is_right(grader, ONE) is True  # a new process


def test_a_broken_answer_is_wrong(grader: Grader) -> None:
    nested = [r"\boxed{" + r"\frac{1}{" * 1000 + "1" + "}" * 1000 + "}", "(" * 50_000]
    for text in (*nested, "$" * 100_000, "final answer" * 3_000, "\0\ud800", ""):
        assert not is_right(grader, text)
    assert is_right(grader, ONE) is True


def test_threads_share_it(grader: Grader) -> None:
    texts = [rf"\boxed{{{number}}}" for number in range(20)] + [r"\boxed{10^{10^{10}}}"] * 2
    with ThreadPoolExecutor(8) as threads:
        verdicts = list(threads.map(lambda text: is_right(grader, text, texts[3]), texts))
    assert verdicts == [number == 3 for number in range(20)] + [None, None]


@pytest.mark.parametrize("known", [True, False])
def test_a_process_that_is_killed_between_answers_is_replaced(
    grader: Grader, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its end shows when it is looked at, or only when it is written to."""
    assert is_right(grader, ONE)
    assert grader._process is not None
    grader._process.kill()
    grader._process.wait()
    if not known:
        monkeypatch.setattr(grader._process, "poll", lambda: None)
    assert is_right(grader, ONE)


def test_memory_is_limited() -> None:
    code = "import resource, grader_process as g; g._limit_memory(); print(resource.getrlimit(resource.RLIMIT_AS)[0])"
    limit = int(run([sys.executable, "-c", code], cwd=TASKS, capture_output=True, check=True, text=True).stdout)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    assert limit == (grader_process.MEMORY if hard == resource.RLIM_INFINITY else min(hard, grader_process.MEMORY))


def test_a_system_that_refuses_the_limit_still_grades() -> None:
    """As macOS does."""
    pytest.importorskip("resource")
    code = """
import resource, grader_process
def refuse(*_): raise ValueError("current limit exceeds maximum limit")
resource.setrlimit = refuse
grader_process._limit_memory()
"""
    run([sys.executable, "-c", code], cwd=TASKS, check=True)


def test_an_interrupt_does_not_put_replies_out_of_step(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(grader, ONE)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(grader, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grader("is_right", ONE, ONE)
    assert is_right(grader, r"\boxed{2}") is False


def test_what_is_not_graded_is_counted_and_warned_of_now_and_then(recwarn: pytest.WarningsRecorder) -> None:
    grader = Grader("math")
    for number in range(1, 10):
        grader.give_up(f"{number}!", "too long")
    assert grader.given_up == 9
    counts = [str(warning.message).split("others: ")[1].split()[0] for warning in recwarn]
    assert counts == ["1", "2", "4", "8"]
    assert "could not be graded" in str(recwarn[-1].message)
    assert "'8!': too long" in str(recwarn[-1].message)


def test_what_takes_no_processor_time_ends_by_the_clock() -> None:
    code = f"import sys, time; sys.path.insert(0, {str(TASKS)!r}); import grader_process as g; g.PATIENCE = 1; "
    grader = Grader("math")
    grader._command = [sys.executable, "-c", code + "g.math_verifier = lambda: {'is_right': time.sleep}; g.main()"]
    grader._command += ["math", "0.3"]
    start = time.perf_counter()
    with pytest.raises(GaveUp, match="it takes more than 5 s or too much memory"):
        grader("is_right", 60)
    assert time.perf_counter() - start < 30


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError('no math-verify here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ImportError, match="the grading process cannot start: no math-verify here"):
        Grader("math")("is_right", ONE, ONE)


@pytest.mark.parametrize("end", ["", "os._exit(0)", f"timer.start(); grader('is_right', {ONE!r}, '9**9**9**9')"])
def test_it_ends_with_its_parent(end: str) -> None:
    """Whether the parent ends by itself or is killed, also in the middle of an answer."""
    script = (
        "import os, threading\n"
        "from grader import Grader\n"
        "grader, timer = Grader('math', 0.5), threading.Timer(0.5, os._exit, (0,))\n"
        f"grader('is_right', {ONE!r}, {ONE!r})\n"
        "print(grader._process.pid, flush=True)\n"
    )
    done = run([sys.executable, "-c", script + end], cwd=TASKS, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    pid, deadline = int(done.stdout), time.perf_counter() + 60
    while _is_alive(pid) and time.perf_counter() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_grading_process_of_its_own(grader: Grader) -> None:
    assert is_right(grader, ONE)
    assert grader._process is not None
    child = os.fork()
    if child == 0:
        ours = grader._process is None and is_right(grader, ONE) is True
        grader.close()
        os._exit(0 if ours else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert is_right(grader, r"\boxed{2}") is False


def test_no_signal_of_the_parent_is_touched(grader: Grader) -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(is_right(grader, r"\boxed{10^{10^{10}}}")))
    thread.start()
    thread.join()
    assert seen == [None]
    assert (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(
    "source",
    [
        "__import__('os').system('true')",
        "exec(chr(49))",
        "open('/etc/passwd')",
        "(1).__class__",
        "(lambda: 1)()",
        "[x for x in (1,)]",
        "lambdify(x, '1')",
        "Integer(1).func(2)",
        "1 if True else 2",
        "f'{1}'",
    ],
)
def test_code_is_not_evaluated(source: str) -> None:
    with pytest.raises(ValueError, match="an answer must be data or an expression, got"):
        grader_process.checked_eval(source)


def test_data_and_expressions_are() -> None:
    import sympy

    assert grader_process.checked_eval("[[0, -1], ('a', 2.5), {1: {2}}]") == [[0, -1], ("a", 2.5), {1: {2}}]
    names = {"Integer": sympy.Integer, "sqrt": sympy.sqrt, "Symbol": sympy.Symbol}
    assert grader_process.checked_eval("sqrt(Integer(4)) ** 3 / Integer(2) - Symbol('x') * 0", names) == 4
