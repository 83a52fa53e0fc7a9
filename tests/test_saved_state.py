"""Files that are whole or as they were, whoever else writes them, and files that cannot be read, which are named."""

import errno
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from paec_kernels.losses.paec_config import PAECConfig
from paec_kernels.saved_state import (
    ADDED,
    PARTIAL,
    UnreadableFileError,
    differing_fields,
    load_saved,
    options_as_json,
    read_json,
    remove_partials,
    whole_file,
    whole_folder,
    write_json,
    write_saved,
)

STATE = {"config": {"seed": 0, "name": "a"}, "weights": torch.arange(1000.0)}


def write_often(path: Path, letter: str) -> None:
    for _ in range(200):
        with whole_file(path) as partial, partial.open("w") as file:
            for _ in range(50):
                file.write(letter * 100)


def test_two_processes_write_one_file_at_once(tmp_path):
    path = tmp_path / "state"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as processes:
        for done in [processes.submit(write_often, path, letter) for letter in "ab"]:
            done.result()
    assert path.read_text() in ("a" * 5000, "b" * 5000)
    assert list(tmp_path.iterdir()) == [path]


def test_writers_of_one_process_id_do_not_meet(tmp_path):
    """As on two machines that share a disk."""
    path = tmp_path / "made" / "state"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the last that was put in place
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as partial:
        partial.write_text("ne") / 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def full_disk():
    """No file may grow beyond 10 kB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_saved(path, {"weights": torch.zeros(10_000)}),
        lambda path: write_json(path, ["a" * 100] * 200),
    ],
    ids=["state", "json"],
)
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path, full_disk, write):
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(OSError, match=re.escape(f"File too large: '{path}'")):
        write(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_in_place_is_on_the_disk(tmp_path, monkeypatch):
    """In this order: the content, its name, the list of names."""
    path, done = tmp_path / "state", []

    def synced(descriptor, was=os.fsync):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.removesuffix(PARTIAL).split(".")[0])
        was(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda *names, was=os.replace: (done.append("replace"), was(*names))[1])
    write_json(path, 1)
    assert done == ["state", "replace", tmp_path.name]
    done.clear()
    with whole_folder(path.with_name("folder")) as partial:
        (partial / "part").write_text("new")
    assert done == ["part", "folder", "replace", tmp_path.name]


def test_a_folder_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "folder"
    for content in ("old", "new"):
        with whole_folder(path) as partial:
            (partial / content).write_text(content)
            assert not path.exists() or [part.name for part in path.iterdir()] == ["old"]
    with pytest.raises(ZeroDivisionError), whole_folder(path) as partial:
        (partial / "newer").write_text("ne") / 0
    assert [part.name for part in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "refused"])
def test_a_folder_that_nothing_has_replaced_is_put_back(tmp_path, monkeypatch, killed):
    """Between its two renames a process may be killed, or the disk refuse the second."""
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")

    def one_rename(source, target, was=os.replace):
        if Path(target) == path and not path.exists() and Path(source).name.endswith(PARTIAL):
            if killed:
                os._exit(9)
            raise OSError(errno.EIO, "Input/output error")
        was(source, target)

    monkeypatch.setattr(os, "replace", one_rename)
    if killed:
        process = os.fork()
        if not process:
            with whole_folder(path) as partial:
                (partial / "new").write_text("new")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
        assert not path.exists()
        remove_partials(tmp_path)
    else:
        with pytest.raises(OSError, match="Input/output error"), whole_folder(path) as partial:
            (partial / "new").write_text("new")
    assert [part.name for part in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]


def test_no_memory_for_a_file_says_nothing_of_the_file(tmp_path, monkeypatch):
    write_saved(tmp_path / "state", STATE)

    def refuse(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(RuntimeError, match=r"^DefaultCPUAllocator"):
        load_saved(tmp_path / "state", "a state", "Remedy.")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "it is empty"),
        (b'{"seed": 1, "st', "it is not JSON"),
        (bytes(range(256)), "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[1]", "it holds a list"),
        (b'{"steps": 1}', "it holds no seed"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path, content, found):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = re.escape(f"{path} must be a config, but {found}") + r".*\. Write it again\.$"
    with pytest.raises(UnreadableFileError, match=message):
        read_json(path, "a config", "Write it again.", ["seed"])


def test_options_are_strict_json():
    options = {"path": Path("a/b"), "names": ("a", "b"), "high": math.inf, "low": -math.inf, "lam": 0.5}
    written = options_as_json(options)
    assert written == {"path": "a/b", "names": ["a", "b"], "high": "inf", "low": "-inf", "lam": 0.5}
    assert options_as_json(written) == written
    json.dumps(written, allow_nan=False)


def test_fields_that_differ_are_named_with_both_values():
    saved, ours = {"a": 1, "b": {"c": 2, "d": 3}, "e": 0}, {"a": 1, "b": {"c": 2, "d": 4}, "f": 0}
    assert differing_fields(saved, ours) == [
        "b.d: checkpoint 3, here 4",
        "f: checkpoint 'absent', here 0",
        "e: checkpoint 0, here 'absent'",
    ]


def test_a_field_that_came_later_counts_as_its_default_where_the_checkpoint_has_none():
    paec = asdict(PAECConfig())  # others' are held to theirs beside them
    assert {"penalty", "anchor_unit"} <= ADDED.keys()
    assert all(paec.get(name, value) == value for name, value in ADDED.items())
    assert differing_fields({"paec": {}}, {"paec": ADDED}) == []
    assert differing_fields({"paec": {}}, {"paec": ADDED | {"penalty": "relative"}}) == [
        "paec.penalty: checkpoint 'absolute', here 'relative'"
    ]
    assert differing_fields({"penalty": "relative"}, {}) == ["penalty: checkpoint 'relative', here 'absent'"]


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return print, ("this must not be run",)


def cut(path: Path, share: float) -> None:
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path, share: float) -> None:
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 255
    path.write_bytes(content)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "dear reader")


UNREADABLE = {
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "one byte": (lambda path: path.write_bytes(b"P"), "it is cut off, or of another kind"),
    "text": (lambda path: path.write_text("seed: 0\n" * 1000), "it is cut off, or of another kind"),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 40), "it is cut off, or of another kind"),
    **{f"cut at {share}": (lambda path, s=share: cut(path, s), "it is cut off") for share in (0.01, 0.3, 0.9, 0.9999)},
    "a weight changed": (lambda path: flip(path, 0.5), "it is damaged"),
    "another archive": (zipped, "it holds something else than tensors and plain values"),
    "plain pickle": (lambda path: path.write_bytes(pickle.dumps(STATE)), "it is cut off, or of another kind"),
    "code": (lambda path: torch.save({"config": Code()}, path), "it holds something else than tensors and plain val"),
    "a tensor": (lambda path: torch.save(STATE["weights"], path), "it holds a Tensor"),
    "another state": (lambda path: torch.save({"weights": 1, "step": 2}, path), "it holds no config"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, capsys):
    write, found = UNREADABLE[name]
    path = tmp_path / "state.pt"
    write(path)
    before = path.read_bytes()
    message = re.escape(f"{path} must be a state, but {found}") + r".*\. Make it again\.$"
    with pytest.raises(UnreadableFileError, match=message) as refused:
        load_saved(path, "a state", "Make it again.", ["config", "weights"])
    assert "\n" not in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
    assert path.read_bytes() == before
    assert capsys.readouterr().out == ""


def test_every_byte_that_changes_is_seen_or_harmless(tmp_path):
    """Each byte in turn: what is read is what was saved, or the file is refused by its name."""
    path = tmp_path / "state.pt"
    small = {"config": {"seed": 0}, "weights": torch.arange(8.0)}
    torch.save(small, path)
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
        try:
            state = load_saved(path, "a state", "Make it again.")
        except UnreadableFileError:
            refused += 1
        else:
            assert state["config"] == small["config"]
            assert torch.equal(state["weights"], small["weights"])
    assert refused > 100


def test_what_was_saved_is_read(tmp_path):
    torch.save(STATE, tmp_path / "state.pt")
    state = load_saved(tmp_path / "state.pt", "a state", "Make it again.", ["config"])
    assert state["config"] == STATE["config"]
    assert torch.equal(state["weights"], STATE["weights"])
    with pytest.raises(FileNotFoundError, match=r"other\.pt"):
        load_saved(tmp_path / "other.pt", "a state", "Make it again.")
