"""A run that is killed at random moments loses nothing that it said was saved, and goes on to the bit."""

from pathlib import Path

import kills
import pytest


def test_two_kills() -> None:
    record = kills.kill_in_new_process("train.kills")
    assert record["kills"] == record["resumes_equal_to_the_bit"] == 2
    assert record["kills_by_moment"] == {"checkpoint": 1, "log": 1}
    assert record["steps_lost_that_were_said_saved"] == 0
    assert record["leftovers_met_by_resumes"]["removed"] == 1


def test_what_became_of_leftovers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A damaged one that is accepted, refused without its name or passed over is told apart from a good end."""

    def refuse(text: str) -> None:
        raise ValueError(text)

    kills.try_leftover(tmp_path / "named", lambda: refuse(f"{tmp_path}/named\nis cut off"))
    kills.try_leftover(tmp_path / "unnamed", lambda: refuse("line 1 is empty"))
    kills.try_leftover(tmp_path / "damaged", lambda: None)
    kills.try_leftover(tmp_path / "whole", lambda: None, whole=True)
    (tmp_path / "passed over").touch()
    left = ["named", "unnamed", "damaged", "whole", "passed over", "gone"]
    found = kills.what_became(left, capfd.readouterr().out, tmp_path)
    assert {leftover.name: leftover.became for leftover in found} == {
        "named": "refused by name",
        "unnamed": "refused without its name",
        "damaged": "accepted, damaged",
        "whole": "accepted, whole",
        "passed over": "neither tried nor removed",
        "gone": "removed",
    }
    assert {leftover.error for leftover in found} == {"/named is cut off", "line 1 is empty", ""}
    for leftover in found:
        record = kills.summary([kills.Kill("time", "", 1, 4, 0, [leftover], [])])
        assert kills.is_bad(record) == (leftover.name in ("unnamed", "damaged", "passed over"))


def test_a_step_counts_once_a_folder() -> None:
    found = [kills.Kill("time", "", folder, saved, 0, [], []) for folder, saved in ((1, 2), (1, 4), (2, 2))]
    assert kills.summary(found)["steps_said_saved"] == 6
