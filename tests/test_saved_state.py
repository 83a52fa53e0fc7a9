"""Files that are whole or as they were, whoever else writes them and however the writing ends."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from paec_kernels.saved_state import differing_fields, whole_file


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


def test_fields_that_differ_are_named_with_both_values():
    saved, ours = {"a": 1, "b": {"c": 2, "d": 3}, "e": 0}, {"a": 1, "b": {"c": 2, "d": 4}, "f": 0}
    assert differing_fields(saved, ours) == [
        "b.d: checkpoint 3, here 4",
        "f: checkpoint 'absent', here 0",
        "e: checkpoint 0, here 'absent'",
    ]
