import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paec_kernels.train.run_log import RunLog, read_rows


def write(folder, steps_done, steps):
    log = RunLog(folder, {"seed": 0}, steps_done)
    for step in steps:
        log.write({"step": step, "reward": step / 10, "anchor": math.nan})
    log.close()


def test_rows_config_and_tensorboard(tmp_path):
    write(tmp_path, 0, [1, 2])
    assert read_rows(tmp_path) == [
        {"step": 1, "reward": 0.1, "anchor": None},
        {"step": 2, "reward": 0.2, "anchor": None},
    ]
    assert json.loads((tmp_path / "config.json").read_text()) == {"seed": 0}
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("reward")] == [
        (1, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
    ]


def test_rows_after_the_checkpoint_are_made_again(tmp_path):
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    assert len(read_rows(tmp_path)) == 3
    write(tmp_path, 2, [3, 4])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_no_log_no_rows(tmp_path):
    assert read_rows(tmp_path) == []
