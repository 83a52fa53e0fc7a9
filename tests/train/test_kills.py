"""A run that is killed at random moments loses nothing that it said was saved, and goes on to the bit."""

import kills


def test_two_kills() -> None:
    record = kills.kill_in_new_process("train.kills")
    assert record["kills"] == record["resumes_equal_to_the_bit"] == 2
    assert record["kills_by_moment"] == {"checkpoint": 1, "log": 1}
    assert record["steps_lost_that_were_said_saved"] == 0
