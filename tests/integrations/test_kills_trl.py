"""PAECGRPOTrainer is killed while it writes checkpoints, and goes on as if nothing had been."""

import kills
import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install 'paec-kernels[trl]'")


@pytest.mark.slow
def test_two_kills() -> None:
    record = kills.kill_in_new_process("integrations.kills_trl")
    assert record["kills"] == record["resumes_equal_to_the_bit"] == 2
    assert record["kills_by_moment"] == {"checkpoint": 2}
    assert record["steps_said_saved"] > 0
    assert record["steps_lost_that_were_said_saved"] == 0
    assert record["leftovers_met_by_resumes"]["refused by name"] > 0
