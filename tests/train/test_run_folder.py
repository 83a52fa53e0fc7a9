"""A run's folder: what is written, what a stopped run leaves, and which checkpoint is refused."""

import json
import math
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from paec_kernels.saved_state import write_saved
from paec_kernels.train.algorithms import CISPOOptions
from paec_kernels.train.config import TrainConfig, plain
from paec_kernels.train.run_folder import (
    OtherConfigError,
    RunLog,
    fitting,
    load_checkpoint,
    read_config,
    read_rows,
    refuse_full_disk,
    set_results_aside,
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


def test_an_infinite_option_is_strict_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    RunLog(tmp_path, plain(TrainConfig(algo="cispo", method=CISPOOptions(clip_high=math.inf))), 0).close()
    config = json.loads((tmp_path / "config.json").read_text(), parse_constant=refuse)
    assert config["method"]["clip_high"] == "inf"
    (tmp_path / "config.json").write_text(json.dumps({"clip_high": math.inf}))  # as earlier versions wrote it
    assert read_config(tmp_path, ["clip_high"]) == {"clip_high": "inf"}


def test_a_checkpoint_with_an_infinite_option_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    for saved in (math.inf, "inf"):  # by an earlier version, and by this one
        write_saved(path, {"config": {"clip_high": saved}})
        assert load_checkpoint(path, {"clip_high": "inf"})["config"]["clip_high"] == saved


def test_rows_are_written_before_the_checkpoint_that_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path, {"seed": 0}, 0)
    log.write({"step": 1, "reward": 0.5})
    synced = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
        patch.setattr(log._board, "flush", lambda was=log._board.flush: (synced.append("TensorBoard"), was()))
        log.sync()
    assert synced == [str(tmp_path / "log.jsonl"), "TensorBoard"]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # while the writer still holds it
    assert [event.step for event in board.Scalars("reward")] == [1]
    log.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "log.jsonl must be the log of the 3 steps that are in checkpoint.pt, but it ends after 0"),
        (b"", "log.jsonl must be the log of the 3 steps that are in checkpoint.pt, but it ends after 0"),
        (b'{"step": 1}\n{"step": 2}\n{"st', "log.jsonl must be .*, but it ends after 2"),
        (b'{"step": 1}\n{"st\n{"step": 3}\n', "log.jsonl must hold a JSON object a line, but line 2 is none"),
        (b'{"step": 1}\n{"step": 3}\n', "log.jsonl must hold .*, of step 1, 2, ..., but line 2 is {'step': 3}"),
        (b'{"step": 1}\n{"step": 1}\n', "log.jsonl must hold .*, of step 1, 2, ..., but line 2 is {'step': 1}"),
        (b"[1]\n", "log.jsonl must hold a JSON object a line, .* but line 1 is"),
        (bytes(range(256)), "log.jsonl must hold a JSON object a line, but line 1 is none"),
    ],
)
def test_a_log_without_the_checkpoints_steps_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    (tmp_path / "config.json").write_text("as it was")
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{tmp_path}/{message}"):
        RunLog(tmp_path, {"seed": 0}, 3)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_what_comes_after_the_checkpoint_may_be_damaged(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2])
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b"\0\0\n{}\n")
    write(tmp_path, 2, [3])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    (tmp_path / "log.jsonl").write_bytes(b"\0\n")
    write(tmp_path, 0, [1])
    assert [row["step"] for row in read_rows(tmp_path)] == [1]


def test_a_full_disk_is_named_and_the_cut_row_made_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {"seed": 0}, 0)
    log.write({"step": 1, "reward": 0.5})
    log.sync()  # TensorBoard writes in a thread of its own, which the limit would stop too
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / "log.jsonl").stat().st_size + 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/log.jsonl'"):
            log.write({"step": 2, "reward": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "log.jsonl").stat().st_size == room
    log.close()
    write(tmp_path, 1, [2, 3])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(100, 100, bias=False)  # 40,000 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=119_999))
    with pytest.raises(OSError, match=rf"needs 120,000 bytes, and the disk has 119,999: '{tmp_path}/checkpoint.pt'"):
        refuse_full_disk(module, tmp_path / "checkpoint.pt")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=120_000))
    refuse_full_disk(module, tmp_path / "checkpoint.pt")


def test_rows_after_the_checkpoint_are_made_again(tmp_path: Path) -> None:
    write(tmp_path, 0, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # killed while it wrote
    assert len(read_rows(tmp_path)) == 3
    write(tmp_path, 2, [3, 4])
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3, 4]


def test_a_checkpoint_comes_back_for_its_config_alone(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    write_saved(path, STATE)
    assert torch.equal(load_checkpoint(path, STATE["config"])["weights"], STATE["weights"])
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OtherConfigError, match=rf"{path} was made with .* configuration: seed: checkpoint 0, here 1\."):
        load_checkpoint(path, STATE["config"] | {"seed": 1})


def test_results_set_aside_again_replace_none(tmp_path: Path) -> None:
    for content in ("first", "second", "third"):
        (tmp_path / "eval.json").write_text(content)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "weights").write_text(content)
        set_results_aside(tmp_path, 0)
    for end, content in (("", "first"), ("-2", "second"), ("-3", "third")):
        assert (tmp_path / f"eval-0{end}.json").read_text() == content
        assert (tmp_path / f"model-0{end}" / "weights").read_text() == content
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["GPU", "CPU"],
)
def test_no_memory_is_no_damage(tmp_path: Path, error: RuntimeError) -> None:
    with pytest.raises(type(error), match=f"^{error}$"), fitting(tmp_path / "checkpoint.pt"):
        raise error


def test_deep_json_in_the_log_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"log\.jsonl must hold a JSON object a line, but line 1 is none"):
        read_rows(tmp_path)
