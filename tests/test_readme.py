"""The README's table of what was tried has the figures of the records."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KILLED = {"train": "`paec train`", "trl": "TRL's trainer with PAEC", "verl": "verl's worker with PAEC"}


def record(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "bench_results" / "trust" / f"{name}.json").read_text())


def table() -> Iterator[tuple[str, str]]:
    fuzz = record("fuzz")
    yield (
        f"{len(fuzz['properties'])} properties and laws, {fuzz['examples']:,} drawn inputs, "
        f"{fuzz['informative']:,} of them with something to get wrong",
        f"{fuzz['failures']} fail",
    )
    mutants = record("mutants")
    yield f"{mutants['faults']} faults planted, one at a time", f"{len(mutants['missed'])} unnoticed by the tests"
    for name, trainer in KILLED.items():
        kills = record(f"kills_{name}")
        lost, saved = kills["steps_lost_that_were_said_saved"], kills["steps_said_saved"]
        resumed = f"{kills['resumes_equal_to_the_bit']} resumed to the bit"
        yield (
            f"{kills['kills']} times SIGKILL to {trainer}",
            f"{lost} lost of {saved} steps said to be saved; {resumed}",
        )
    trl = record("trl")
    stock, ours = trl["passed_by_stock"], trl["passed_by_ours"]
    alone = len(trl["passed_by_stock_alone"])
    yield (
        f"TRL's {trl['tests']} own tests of GRPOTrainer",
        f"{stock} pass with TRL's trainer, {ours} with PAEC's in its place; {alone} with TRL's alone",
    )
    graphs = [row for row in record("recompiles")["graphs"] if row["shapes"] == "a dozen"]
    first = max(sum(row["forward"][:2]) for row in graphs if not row["graph_breaks"])
    later = sum(sum(row[name][2:]) for row in graphs for name in ("forward", "backward"))
    yield (
        f"a dozen shapes of batch through `torch.compile`, {len({row['entry'] for row in graphs})} entry points",
        f"{first} graphs each way for the first two shapes, {later} for the ten after",
    )


def test_each_figure_is_that_of_its_record() -> None:
    lines = (ROOT / "README.md").read_text().split("\n")
    for tried, found in table():
        assert f"| {tried} | {found} |" in lines
