"""A run's folder: what is written, what a stopped run leaves, and which checkpoint is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paec_kernels.train.algorithms import CISPOOptions
from paec_kernels.train.config import TrainConfig, plain
from paec_kernels.train.run_folder import (
    OtherConfigError,
    RunLog,
    load_checkpoint,
    read_rows,
    save_checkpoint,
)

STATE = {"config": {"seed": 0, "steps": 5}, "weights": torch.arange(3.0)}


def write(folder: Path, steps_done: int, steps: list[int]) -> None:
    log = RunLog(folder, {"seed": 0}, steps_done)
    for step in steps:
        log.write({"step": step, "reward": step / 10, "anchor": math.nan})
    log.close()


def test_rows_config_and_tensorboard(tmp_path: Path) -> None:
    assert read_rows(tmp_path) == []
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


def test_an_option_may_be_infinite(tmp_path: Path) -> None:
    config = plain(TrainConfig(algo="cispo", method=CISPOOptions(clip_high=math.inf)))
    RunLog(tmp_path, config, 0).close()
    assert json.loads((tmp_path / "config.json").read_text()) == config


def test_rows_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    assert len(read_rows(tmp_path)) == 3
    write(tmp_path, 2, [3, 4])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_comes_back_for_its_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(STATE, path)
    assert torch.equal(load_checkpoint(path, STATE["config"])["weights"], STATE["weights"])
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OtherConfigError, match=rf"{path} was made with .* configuration: seed: checkpoint 0, here 1\."):
        load_checkpoint(path, STATE["config"] | {"seed": 1})
