"""Finished runs are found and read, or refused by the name of what is wrong with them."""

from pathlib import Path

import pytest
from train.made_runs import write_run

from paec_kernels.train.report.runs import find_runs, read_run


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
