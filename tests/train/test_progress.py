"""Long work in a terminal, and where there is none."""

import io

import pytest
from rich.console import Console

from paec_kernels.train import commands, progress
from paec_kernels.train.progress import Bars, Lines

ROW = {"reward": 0.25, "entropy": 12.345, "selected_entropy": 1.5, "floor": 10.0}


def test_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    now = [0.0]
    shown = progress.progress(Console(file=out, width=30))
    assert isinstance(shown, Lines)
    monkeypatch.setattr(shown, "get_time", lambda: now[0])
    with shown:
        bar = shown.add_task("train", total=100)
        shown.add_task("load a model", total=None)
        for step in range(1, 101):
            now[0] += 1.0
            shown.update(bar, completed=step, figures=f"reward [b]{step / 100}")
        for _ in range(9):  # the end is told once, however often
            now[0] += 10.0
            shown.update(bar, completed=100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "load a model"
    assert lines[1] == "train   1/100, 0:00:01  reward [b]0.01"  # whole, though wider than 30
    assert lines[-1] == "train 100/100, 0:01:40  reward [b]1.0"
    assert len(lines) == 1 + 11  # steps 1, 11, ... 91, and the last


def test_every_line_is_there_at_once() -> None:
    """A log file shows it while the work goes on."""

    class File(io.StringIO):
        flushed = ""

        def flush(self) -> None:
            self.flushed = self.getvalue()

    out = File()
    shown = progress.progress(Console(file=out))
    bar = shown.add_task("evaluate")
    shown.advance(bar)
    assert out.flushed == "evaluate   1/100, 0:00:00\n"


@pytest.mark.parametrize("width", [80, 60])
def test_bars_fit_the_terminal(width: int) -> None:
    shown = progress.progress(Console(file=io.StringIO(), width=width, force_terminal=True))
    assert isinstance(shown, Bars)
    bar = shown.add_task("train", total=250)
    shown.update(bar, completed=200, figures=commands.FIGURES.format(**ROW))
    plain = Console(width=width)
    with plain.capture() as capture:
        plain.print(*shown.get_renderables())
    bars, figures = capture.get().splitlines()
    assert len(bars) <= width
    assert all(part in bars.split() for part in ("train", "200/250", "0:00:00"))
    assert figures.strip() == "reward 0.25  entropy 12.345  selected 1.50  floor 10.00"
