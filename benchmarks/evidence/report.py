"""`bench_results/rlvr/long/README.md` and its plots, written from the rows alone: no figure there is typed by hand.

python -m benchmarks.evidence.report

What a person has to say about them is ``findings.md`` beside the rows, which the page begins with. Every number in it
must be one of the page's.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import plan, plots
from benchmarks.evidence.outcomes import Family, fill_warm_starts, gather, mean
from benchmarks.evidence.run import FRESH, RERUNS, ROWS, read
from benchmarks.evidence.tables import arms, comparisons, grids, mechanisms, shown, table_header, table_line
from benchmarks.evidence.words import how_it_was_run, not_run, what_this_shows, what_was_asked
from paec_kernels.saved_state import whole_file
from paec_kernels.train.report.statistics import PairedComparison, Scores, planned_comparisons, sign_flip_test

Records = Sequence[dict[str, Any]]
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def write(folder: Path = ROWS) -> list[Path]:
    """Write the page and its plots, and return what was written.

    Raises:
        ValueError: a row that cannot be used, or findings with a number that the page does not have.
    """
    gathered = {name: gather(name, read(name, folder)) for name in plan.FAMILIES}
    families = [family for family in gathered.values() if isinstance(family, Family)]
    missing = {name: found for name, found in gathered.items() if isinstance(found, str)}
    records = [json.loads(path.read_text()) if (path := folder / name).exists() else [] for name in (RERUNS, FRESH)]
    page = text(families, missing, *records)
    findings = folder / "findings.md"
    if findings.exists():
        if unfounded := numbers(findings.read_text()) - numbers(page):
            raise ValueError(
                f"{findings} must hold no number that the page has not, got {', '.join(sorted(unfounded))}"
            )
        title, _, rest = page.partition("\n\n")
        page = "\n\n".join([title, findings.read_text().strip(), rest])
    drawn = dict(figures(families))
    for name, figure in drawn.items():
        plots.save(figure, folder / f"{name}.png")
    with whole_file(folder / "README.md") as partial:
        partial.write_text(page)
    return [folder / "README.md", *(folder / f"{name}.png" for name in drawn)]


def numbers(text: str) -> set[str]:
    return set(NUMBER.findall(text))


def figures(families: Sequence[Family]) -> Iterator[tuple[str, Figure]]:
    if pooled := compared(pool(families)):
        yield "summary", plots.summary(families, pooled)
    for family in families:
        for number, group in enumerate(plots.groups_of(list(family.runs)), start=1):
            yield f"{_stem(family)}_entropy_{number}", plots.entropy(family, group)
            yield f"{_stem(family)}_outcomes_{number}", plots.outcomes(family, group)


def text(families: Sequence[Family], missing: dict[str, str], reruns: Records, fresh: Records) -> str:
    """Return the page without its findings."""
    within = {family.name: compared(family.scores) for family in families}
    pooled = compared(pool(families))
    return "\n".join(
        [
            "# Where entropy is spent: long answers with forks",
            "",
            "Written by `python -m benchmarks.evidence.report` from the rows beside it: no figure is typed by hand.",
            "",
            *not_run(families, missing),
            *what_this_shows(families, within, pooled),
            *((*what_was_asked(families), *how_it_was_run(families)) if families else ()),
            *(of_all(families, pooled) if pooled else ()),
            *(line for family in families for line in of_family(family, within[family.name])),
            *(grids(families) if families else ()),
            *again(reruns),
            *other_seeds(fresh),
        ]
    )


def compared(scores: Scores) -> list[PairedComparison]:
    """Return the comparisons of which both arms are there: the planned ones, all other arms with the baseline, and
    those that are told beside."""
    planned = [pair for pair in plan.PLANNED if set(pair) <= scores.keys()]
    others = [(arm, plan.BASELINE) for arm in scores if arm != plan.BASELINE and (arm, plan.BASELINE) not in planned]
    others += [pair for pair in plan.EXPLORED if set(pair) <= scores.keys()]
    if not planned:
        return []
    return planned_comparisons(scores, planned, plan.OUTCOMES, exploratory=others, warm_starts=plan.WARM_STARTS)


def pool(families: Sequence[Family]) -> dict[str, dict[int, dict[str, float]]]:
    """Return each arm's outcomes by seed, as means over the families; of arms and seeds that all families have.

    With fewer than two families there is nothing to pool.
    """
    if len(families) < 2:
        return {}
    seeds = sorted(set.intersection(*(set(family.seeds) for family in families)))
    if not fill_warm_starts(seeds):
        return {}
    return {
        arm: {
            seed: {name: mean(family.scores[arm][seed][name] for family in families) for name in plan.OUTCOMES}
            for seed in seeds
        }
        for arm in families[0].runs
        if all(arm in family.runs for family in families)
    }


def of_all(families: Sequence[Family], pooled: list[PairedComparison]) -> Iterator[str]:
    yield from ("## All families together", "")
    yield f"Means over the {len(families)} families for each seed, of the arms that every family has."
    yield from ("", *comparisons(pooled), *over_warm_starts(families, pooled))
    yield from ("![differences from the baseline](summary.png)", "")


def again(reruns: Records) -> Iterator[str]:
    """Tabulate runs that were made again."""
    if not reruns:
        return
    yield from ("## Runs made again", "")
    yield (
        "By `python -m benchmarks.evidence.rerun`. Columns of the log that came out the same to the digit, and of the "
        "answers sampled in training the share whose letters all stand where solutions have such, so that roles, which "
        "are told by place, are those of the letters."
    )
    yield ""
    yield from table_header(["family", "arm", "seed", "commit", "columns the same", "answers that fit"])
    for each in reruns:
        cells = [f"{each['same']} of {each['columns']}", f"{100 * each['fitting'] / each['answers']:.1f} %"]
        arm, commit = f"`{each['arm']}`", each["provenance"]["commit"]
        yield table_line([each["family"], arm, str(each["seed"]), commit, *cells])
    yield ""


def other_seeds(fresh: Records) -> Iterator[str]:
    """Tabulate runs that `paec compare` made with seeds that are not the plan's."""
    if not fresh:
        return
    yield from ("## Other seeds, by `paec compare`", "")
    yield from table_header(["family", "arm", f"{plan.PRIMARY} by seed", "smallest and largest above"])
    arms: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in fresh:
        arms.setdefault((each["family"], each["arm"]), []).append(each)
    for (family, arm), runs in arms.items():
        areas = ", ".join(f"{each['seed']}: {shown(plan.PRIMARY, each['area'])}" for each in runs)
        low, high = (shown(plan.PRIMARY, runs[0][end]) for end in ("low", "high"))
        yield table_line([family, f"`{arm}`", areas, f"{low} to {high}"])
    yield ""


def over_warm_starts(families: Sequence[Family], pooled: list[PairedComparison]) -> Iterator[str]:
    """Tabulate the planned comparisons with the mean of a family's runs from one warm start as a pair."""
    yield from ("Planned, over warm starts: each of a family's is a pair, the mean of its seeds. Difference, p.", "")
    yield from table_header(["", *plan.OUTCOMES])
    for arm, baseline in dict.fromkeys((row.arm, row.baseline) for row in pooled if row.planned):
        cells = []
        for outcome in plan.OUTCOMES:
            pairs = [
                mean(family.scores[arm][seed][outcome] - family.scores[baseline][seed][outcome] for seed in seeds)
                for family in families
                for seeds in of_warm_starts(family.seeds)
            ]
            cells.append(f"{shown(outcome, mean(pairs), '+')}, p {sign_flip_test(pairs):.2g}")
        yield table_line([f"`{arm}` - `{baseline}`", *cells])
    yield ""


def of_warm_starts(seeds: Sequence[int]) -> list[list[int]]:
    return [[seed for seed in seeds if seed % plan.WARM_STARTS == start] for start in range(plan.WARM_STARTS)]


def of_family(family: Family, rows: list[PairedComparison]) -> Iterator[str]:
    yield from (f"## {family.name}", "")
    yield (
        f"{len(family.seeds)} seeds, {family.batches} batches; evaluated on {family.problems} problems with "
        f"{family.samples} samples each. Cells: mean [interval], IQM."
    )
    yield ""
    yield from arms(family)
    yield from comparisons(rows)
    for number, _ in enumerate(plots.groups_of(list(family.runs)), start=1):
        yield f"![entropy]({_stem(family)}_entropy_{number}.png)"
        yield f"![outcomes]({_stem(family)}_outcomes_{number}.png)"
    yield ""
    yield from mechanisms(family)


def _stem(family: Family) -> str:
    return family.name.replace("+", "_free")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS, help="folder of the rows, the page and its plots")
    for path in write(parser.parse_args().rows):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
