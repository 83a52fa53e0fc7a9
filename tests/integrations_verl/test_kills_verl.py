"""verl's worker with PAEC is killed while it writes checkpoints, and goes on as if nothing had been."""

import kills
import pytest

pytest.importorskip("verl", reason="verl is not installed: its transformers is an older one, see make test-verl")


@pytest.mark.slow
def test_two_kills() -> None:
    record = kills.kill_in_new_process("integrations_verl.kills_verl")
    assert record["kills"] == record["resumes_equal_to_the_bit"] == 2
    assert record["kills_by_moment"] == {"checkpoint": 2}
    assert record["steps_said_saved"] > 0
    assert record["steps_lost_that_were_said_saved"] == 0
    assert record["leftovers_met_by_resumes"]["refused by name"] > 0
