"""A run's folder: what is written, what a stopped run leaves, and what is read back or refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train.made_runs import write_run

from paec_kernels.train.run_folder import (
    OtherConfigError,
    RunLog,
    find_runs,
    load_checkpoint,
    read_rows,
    read_run,
    save_checkpoint,
)

STATE = {"config": {"seed": 0, "method": {"lam": 1.0, "clip": 0.2}}, "weights": torch.arange(3.0)}


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


def test_rows_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    assert len(read_rows(tmp_path)) == 3
    write(tmp_path, 2, [3, 4])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(STATE, path)
    assert torch.equal(load_checkpoint(path, STATE["config"])["weights"], STATE["weights"])
    assert list(tmp_path.iterdir()) == [path]


def test_each_differing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(STATE, path)
    with pytest.raises(OtherConfigError) as refused:
        load_checkpoint(path, {"seed": 1, "method": {"lam": 0.3, "clip": 0.2}, "new": True})
    for text in (
        "seed: checkpoint 0, here 1",
        "method.lam: checkpoint 1.0, here 0.3",
        "new: checkpoint 'absent', here True",
        str(path),
    ):
        assert text in str(refused.value)
    assert "clip" not in str(refused.value)


def test_runs_are_found_below_a_folder(tmp_path: Path) -> None:
    for name in ("a/1", "a/0", "b"):
        write_run(tmp_path / name, "paec", 0)
    (tmp_path / "c").mkdir()
    assert find_runs([tmp_path / "b", tmp_path]) == [tmp_path / name for name in ("b", "a/0", "a/1")]
    for missing in ("c", "d"):
        with pytest.raises(ValueError, match=rf"folders must hold finished runs .* got .*/{missing}"):
            find_runs([tmp_path / missing])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", r"config.json must be a JSON object"),
        ("config.json", '{"algo": "paec"}', r"config.json must hold the field 'seed', got algo"),
        ("config.json", '{"seed": 1}', r"config.json must hold the field 'algo', got seed"),
        ("log.jsonl", "", r"log.jsonl must hold at least one step"),
        ("log.jsonl", "{\n", r"log.jsonl must hold a JSON object a line"),
        ("log.jsonl", '{"step": 1, "reward": 0.5}\n', r"log.jsonl, line 1: .* entropy is missing"),
        ("eval.json", None, r"must have been evaluated: there is no .*/eval.json"),
    ],
)
def test_broken_folders_are_refused(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    folder = write_run(tmp_path / "run", "paec", 0)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_run(folder)
