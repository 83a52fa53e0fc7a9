"""The page holds what the rows hold: every figure with a unit, and none where there is no row."""

import json
import re
from dataclasses import replace

import pytest
import torch

from benchmarks import cost_model, harness, page
from benchmarks.parts import Part
from benchmarks.rivals import eager, ours
from benchmarks.rows import RESULTS, RowFile, path_of, read
from benchmarks.workload import Case

CASE = Case(9, 300, torch.float32, "flat", "cpu")
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


@pytest.fixture(scope="module")
def rows():
    names = (ours.IMPLEMENTATIONS[0].name, eager.IMPLEMENTATIONS[0].name, "verl")
    return list(harness.rows_of_part(Part("rivals", CASE, 3, names)))


def text_of(rows=(), predictions=None):
    """The page of these rows of rivals on the CPU, and no others."""
    found = {device: {section: [] for section in page.SECTIONS} for device in page.DEVICES}
    found["cpu"]["rivals"] = rows
    return page.text(found, [], None, predictions)


def tables(text):
    """The cells of all tables but the one of what each computes, which is about code and holds no measurement."""
    measured = text[text.index("\n## On a GPU") :]
    return [cell.strip() for line in measured.splitlines() if line.startswith("|") for cell in line.split("|")[1:-1]]


def test_no_figure_without_a_row():
    text = text_of()
    assert tables(text) == []
    assert text.count("**No row yet.**") == 2
    assert not NUMBER.findall(text[text.index("\n## On a GPU") :])


def test_gpu_tables_say_that_they_are_empty(rows):
    text = text_of(rows)
    gpu = text[text.index("\n## On a GPU") : text.index("\n## On a CPU")]
    assert "**No row yet.** `make bench-gpu`" in gpu
    assert gpu.count(": empty") == len(page.SECTIONS)
    assert "|" not in gpu


def test_every_figure_is_a_rows(rows):
    """All figures of the rows are replaced: then the tables hold those and no others, but for errors."""
    replaced = [
        row
        if row.p50 is None
        else replace(row, p20=1.001, p50=1.002, p80=1.003, relative=7.77, share=0.123, bandwidth=4.56e9)
        for row in rows
    ]
    figures = {n for cell in tables(text_of(replaced)) if "e-" not in cell for n in NUMBER.findall(cell)}
    assert figures == {"1,001", "1,002", "1,003", "7.77", "12.3", "4.56"}


def test_a_row_without_a_number_is_shown_with_its_reason(rows):
    (line,) = [x for x in text_of(rows).splitlines() if x.startswith("| verl | missing")]
    assert "missing: verl is not installed" in line
    assert not NUMBER.findall(line)


def test_where_figures_come_from(rows):
    text = page.origin(rows)
    for part in (rows[0].device, f"`{rows[0].command}`", rows[0].commit, rows[0].date, rows[0].versions["torch"]):
        assert part in text


def test_page_and_plots_are_written_from_the_files_alone(rows, tmp_path):
    file = RowFile(path_of(tmp_path, "cpu", "rivals"))
    for row in rows:
        file.write(row)
    written = page.write(tmp_path)
    assert {path.name for path in written} == {"README.md", "cpu_time_of_rivals.png"}
    text = (tmp_path / "README.md").read_text()
    for path in re.findall(r"\(plots/(.*?)\)", text):
        assert (tmp_path / "plots" / path).stat().st_size > 1000
    first = {path: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    page.write(tmp_path)
    assert {path: path.read_bytes() for path in first} == first  # the same rows, the same pictures


def test_a_plots_title_names_every_device_and_the_span_of_dates(rows):
    older = [replace(row, device="another", date="2026-01-02 03:04 UTC") for row in rows]
    for _, figure in page.figures({"vocabulary": rows + older}):
        title = figure.get_suptitle()
        assert f"another, {rows[0].device}" in title or f"{rows[0].device}, another" in title
        assert f"2026-01-02 03:04 UTC to {max(row.date for row in rows)}" in title


def test_the_committed_page_is_that_of_the_committed_rows():
    """`python -m benchmarks.page` writes it."""
    rows = {device: {s: read(path_of(RESULTS, device, s)) for s in page.SECTIONS} for device in page.DEVICES}
    drawn = [path.stem for path in (RESULTS / "plots").glob("*.png")]
    compiled, predictions = (json.loads((RESULTS / f"{f}.json").read_text()) for f in ("compiled_code", "predictions"))
    assert page.text(rows, drawn, compiled, predictions) == (RESULTS / "README.md").read_text()


@pytest.fixture
def predictions():
    counts = [cost_model.Counts(kernel, "bf16", 128, 128, 0, None, 32, 320, 1000, 0, 64, False)
              for kernel in cost_model.MEASURED_AS]  # fmt: skip
    return cost_model.record(counts, {"command": "e", "commit": "c", "date": "d", "triton": "t"})


def predicted_lines(predictions, rows):
    lines = (line for line in page.predicted(predictions, rows) if re.match(r"\| \d", line))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_predictions_stand_in_a_section_of_their_own(predictions):
    """And without a row nothing stands beside them."""
    text = text_of(predictions=predictions)
    start = text.index("\n## Predicted, and measured")
    assert not NUMBER.findall(text[text.index("\n## On a GPU") : start])
    assert "**no measurement**" in text[start:]
    lines = predicted_lines(predictions, [])
    assert len(lines) == len(cost_model.DEVICES) * len(cost_model.VOCABULARIES) * len(cost_model.ROWS)
    assert all(line[3] == line[5] == line[7] == "" and all(line[2::2]) for line in lines)


def test_a_row_stands_beside_its_prediction(rows, predictions):
    (prediction,) = [p for p in predictions["predictions"]
                     if (p["device"], p["kernel"], p["n"], p["v"]) == ("H100", "backward", 4096, 151_936)]  # fmt: skip
    time = 1.5 * prediction["seconds"]
    row = replace(next(row for row in rows if row.status == "ok"), implementation="token_stats", passes="backward",
                  n=4096, v=151_936, dtype="bfloat16", logits="real", device="NVIDIA H100 80GB HBM3",
                  p20=time, p50=time, p80=time)  # fmt: skip
    others = [replace(row, passes="forward", n=512, **{name: value}) for name, value in
              {"logits": "flat", "dtype": "float32", "device": "AMD", "implementation": "another"}.items()]  # fmt: skip
    lines = predicted_lines(predictions, [*others, row])
    (line,) = [line for line in lines if any(line[3::2])]
    assert line[:2] == ["151,936", "4,096"]
    assert lines.index(line) < len(lines) / 2  # among the H100's
    assert line[5].endswith(", times 1.5")
    assert (line[3], line[7]) == ("", "")


def test_plots_leave_out_rows_without_a_number(rows):
    assert dict(page.figures({"rivals": [row for row in rows if row.status != "ok"]})) == {}
    floor_alone = [row for row in rows if row.anchor is None and row.status == "ok"]
    assert {name for name, _ in page.figures({"rivals": floor_alone})} == {"time_of_rivals"}
