"""The report's three forms, from one made by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="needs the demo's packages: pip install 'paec-kernels[demo]'")
from rich.console import Console

from paec_kernels.demo import picture, terminal
from paec_kernels.demo.comparison import Comparison, Side
from paec_kernels.demo.report import Answer, Batch, Group, Report, logp_change, save_json
from paec_kernels.demo.step import StepResult


def answer(reward: float, advantage: float, tokens: list[str]) -> Answer:
    n = len(tokens)
    numbers = [0.1 * (i + 1) for i in range(n)]
    mask = [i / (n - 1) for i in range(n)]
    negative = [-x for x in numbers]
    return Answer("".join(tokens), reward, advantage, tokens, negative, numbers, numbers, [3] * n, numbers, mask)


@pytest.fixture
def report() -> Report:
    batch = Batch(9, 0.3, 0.5, 0.61, 2.5, None, None, 0.0)
    return Report(
        model="a model",
        device="a device",
        versions={"torch": "2.13.0"},
        options={"seed": 6},
        config={"rho": 0.8},
        groups=[
            Group(
                "What is 9 + 6? [ten]",
                15,
                [
                    answer(1.0, 0.7, ["9 + 6", " =", " 15", "<|im_end|>"]),
                    answer(0.0, -0.7, ["it\n", "$is$", " 文[b]"]),
                ],
            ),
            Group("What is 5 * 3?", 15, [answer(0.0, 0.0, ["no", " idea"])]),
        ],
        batch=batch,
        step=StepResult(0.0123, -0.0025, 0.0, 1.5),
        batch_after=replace(batch, mean_entropy=0.55, anchor=0.5, floor=0.4),
        logp_change={"rewarded": 0.05, "not rewarded": None},
        comparison=Comparison(
            384, 49152, "float32", 5, Side(0.1, 80 * 2**20, 1e-6, 2e-7), Side(0.9, 450 * 2**20, 1e-3, 3e-5)
        ),
        comparison_linear=None,
        seconds={"load": 12.0},
    )


def printed(report: Report, color_system: str | None) -> str:
    console = Console(width=120, color_system=color_system, force_terminal=True, highlight=False)
    with console.capture() as capture:
        terminal.show(report, console)
    return capture.get()


def test_terminal_without_colours_puts_high_masks_in_brackets(report: Report) -> None:
    text = printed(report, None)
    assert "9 + 6 =[ 15][■]" in text
    assert "it↵[$is$][ 文[b]]" in text
    assert "What is 9 + 6? [ten] expected 15; 1 of 2 answers are right" in text
    assert "equal rewards, so advantage 0" in text
    for shown in ("+0.012300", "-0.002500", "+0.009800", "9.0 x as fast", "450 MiB", "80 MiB", "18 %"):
        assert shown in text
    assert "not set yet" in text
    assert "0.4000, penalty 0.0000" in text
    assert "no such answer" in text


def test_terminal_colours_go_from_calm_to_decisive(report: Report) -> None:
    text = printed(report, "truecolor")
    for mask, token in ((0.0, "9 + 6"), (1.0, "■")):
        r, g, b = terminal.DECISIVE if mask else terminal.CALM
        assert f"48;2;{r};{g};{b}m{token}" in text


def test_json_holds_the_report(report: Report, tmp_path: Path) -> None:
    save_json(report, tmp_path / "demo.json")
    saved = json.loads((tmp_path / "demo.json").read_text())
    assert saved["groups"][0]["answers"][0]["tokens"] == ["9 + 6", " =", " 15", "<|im_end|>"]
    assert saved["step"] == {
        "policy_loss": 0.0123,
        "entropy_bonus": -0.0025,
        "weighted_penalty": 0.0,
        "gradient_norm": 1.5,
    }
    assert saved["batch"]["anchor"] is None
    assert saved["comparison"]["eager"]["peak_bytes"] == 450 * 2**20
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]


def test_a_failed_save_keeps_the_old_file(report: Report, tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("old")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(replace(report, seconds={"load": float("nan")}), tmp_path / "demo.json")
    assert (tmp_path / "demo.json").read_text() == "old"


@pytest.mark.filterwarnings("error")  # a glyph that the font lacks, or text read as mathematics, warns
def test_picture(report: Report, tmp_path: Path) -> None:
    picture.save_png(report, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["demo.png"]


def test_picture_wraps_at_token_boundaries() -> None:
    long = answer(0.0, 0.0, ["x" * 50] * 5)
    assert [len(line) for line in picture._wrapped(long)] == [2, 2, 1]


def test_logp_change_is_a_mean_over_valid_tokens() -> None:
    before = torch.zeros(2, 3)
    after = torch.tensor([[1.0, 2.0, 99.0], [-1.0, 99.0, 99.0]])
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert logp_change(before, after, valid, torch.tensor([1.0, 0.0])) == {"rewarded": 1.5, "not rewarded": -1.0}
    assert logp_change(before, after, valid, torch.zeros(2))["rewarded"] is None
