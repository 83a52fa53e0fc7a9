"""The page about a real model: arms take turns, go on from their checkpoints, and its numbers are the rows'."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.evidence import real_model
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.presets import PRESETS

BATCHES = ["--steps", "7", "--prompts", "2", "--answers", "2", "--max-new-tokens", "6", "--precision", "bfloat16"]


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """The tiny model in the place of the real one."""
    start = WarmStart(skill_steps=2, habit_steps=1, batch=8)
    tiny = replace(PRESETS["tiny"], warm_start=start, cache=tmp_path / "cache")
    monkeypatch.setattr(real_model, "PRESETS", {"smollm2": tiny})
    monkeypatch.setattr(real_model, "TASKS", ("add", "sub"))
    arms = {name: real_model.ARMS[name] for name in ("grpo", "paec-positions")}
    monkeypatch.setattr(real_model, "ARMS", arms)
    return ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), *BATCHES]


def test_arms_take_turns_and_the_page_tells_their_means(arguments, tmp_path, capsys) -> None:
    assert real_model.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[:4] == ["grpo: 5 batches", "paec-positions: 5 batches", "grpo: 7 batches", "paec-positions: 7 batches"]
    rows = real_model.published(tmp_path / "out")
    assert [(row["arm"], len(row["log"]["reward"])) for row in rows] == [("grpo", 7), ("paec-positions", 7)]
    assert rows[1]["config"]["method"]["paec"]["anchored"] == "positions"
    page = (tmp_path / "out" / "README.md").read_text()
    assert "The first 7 batches of each arm, of 2 prompts with 2 answers of at most 6 tokens" in page
    assert "precision `bfloat16`" in page
    entropy = rows[1]["log"]["entropy"]
    (line,) = [line for line in page.splitlines() if line.startswith("| `paec-positions` |")]
    cells = line.split(" | ")
    assert cells[1] == "absolute, 1, 0.8"
    assert cells[4] == f"{entropy[0]:.2f} -> {entropy[-1]:.2f}"
    assert cells[7] == f"{sum(rows[1]['log']['mean_mask']) / 7:.2f}"
    assert [line.count(" - ") for line in page.splitlines() if line.startswith("| `grpo` |")] == [
        5
    ]  # it has no bonus and no penalty


def test_it_goes_on_where_it_was_stopped(arguments, tmp_path, capsys, monkeypatch) -> None:
    turns = real_model.train_in_turns

    def one_turn(configs, until):
        yield next(turns(configs, until))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_model, "train_in_turns", one_turn)
        assert real_model.main(arguments) == 0
    assert [(row["arm"], len(row["log"]["reward"])) for row in real_model.published(tmp_path / "out")] == [("grpo", 5)]
    (made,) = real_model.published(tmp_path / "out")[0]["provenance"]
    before = (tmp_path / "out" / "README.md").read_text()
    assert real_model.main([*arguments, "--minutes", "0"]) == 0
    assert (tmp_path / "out" / "README.md").read_text() == before
    capsys.readouterr()
    monkeypatch.setattr(real_model, "provenance", lambda: made | {"commit": "another"})
    assert real_model.main(arguments) == 0
    assert capsys.readouterr().out.startswith("paec-positions: 5 batches\ngrpo: 7 batches\n")
    of_arms = [[each["commit"] for each in row["provenance"]] for row in real_model.published(tmp_path / "out")]
    assert of_arms == [[made["commit"], "another"], ["another"]]


def test_without_a_row_there_is_no_page(arguments, tmp_path) -> None:
    assert real_model.main([*arguments, "--minutes", "0"]) == 0
    assert not (tmp_path / "out").exists()


def test_the_published_page_is_that_of_the_published_rows(tmp_path) -> None:
    folder = Path(__file__).parents[2] / real_model.FOLDER
    (tmp_path / real_model.ROWS).symlink_to(folder / real_model.ROWS)
    real_model.write_page(tmp_path)
    assert (tmp_path / real_model.PAGE).read_text() == (folder / real_model.PAGE).read_text()
    assert {len(row["log"]["reward"]) for row in real_model.published(folder)} == {40}
