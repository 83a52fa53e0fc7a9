"""A folder is held by one process, whose death frees it, and is known to be writable before the work."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from paec_kernels.train import out_folder
from paec_kernels.train.out_folder import FolderInUseError, held

HOLD = """
import sys, time
from pathlib import Path
from paec_kernels.train.out_folder import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_the_second_process_is_refused_until_the_first_dies(tmp_path, holder):
    folder = tmp_path / "run"
    message = f"{folder} is held by process {holder.pid} on {socket.gethostname()}"
    for path in (folder, tmp_path / "other" / ".." / "run"):  # by whatever name
        (tmp_path / "other").mkdir(exist_ok=True)
        with pytest.raises(FolderInUseError, match=re.escape(f"{message}".removeprefix(str(folder)))), held(path):
            pytest.fail("held twice")
    with pytest.raises(FolderInUseError, match=re.escape(message)), held(folder):
        pytest.fail("held twice")
    assert [path.name for path in folder.iterdir()] == [out_folder.LOCK]
    with held(tmp_path / "another"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (folder / out_folder.LOCK).exists()  # of the killed process; the system has unlocked it
    with held(folder):
        assert (folder / out_folder.LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"


def test_the_process_that_holds_it_goes_on(tmp_path):
    with held(tmp_path / "a"):
        with held(tmp_path / "a"), held(tmp_path / "b"):
            pass
        assert (tmp_path / "a" / out_folder.LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_its_holder_has_just_removed_is_none(tmp_path, monkeypatch):
    """As where the holder lets go between the opening of its file and the locking."""
    locked = []

    def flock(descriptor, how, was=fcntl.flock):
        was(descriptor, how)
        locked.append(how)
        if len(locked) == 1:
            (tmp_path / out_folder.LOCK).unlink()

    monkeypatch.setattr(out_folder.fcntl, "flock", flock)
    with held(tmp_path):
        assert (tmp_path / out_folder.LOCK).read_text().startswith(f"process {os.getpid()} ")
    assert len(locked) == 2


def test_what_was_written_stays_and_what_a_killed_writer_left_goes(tmp_path):
    run = tmp_path / "run"
    unique = uuid.uuid4().hex
    (run / f"model.{unique}.partial").mkdir(parents=True)
    (run / f"model.{unique}.partial" / "weights").write_text("hal")
    (run / f"checkpoint.pt.{unique}.partial").write_text("hal")
    for name in ("log.jsonl", "mine.partial", "mine.old", ".hidden"):
        (run / name).write_text("the user's")
    with held(run):
        (run / "eval.json").write_text("{}")
    assert sorted(path.name for path in run.iterdir()) == [
        ".hidden", "eval.json", "log.jsonl", "mine.old", "mine.partial",
    ]  # fmt: skip


def test_an_error_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_folder_to_write_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")

    def refuse(path):
        message = rf"out must be a folder to write to, got {re.escape(str(path))}: \w+"
        with pytest.raises(ValueError, match=message), held(path):
            pytest.fail("held")

    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere"), Path("/dev/full")):
        refuse(path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(out_folder.os, "write", full)
    refuse(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
