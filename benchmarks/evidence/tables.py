"""Tables of the report, in Markdown, and how its numbers are written."""

import math
from collections.abc import Iterable, Iterator, Sequence

from benchmarks.evidence import outcomes, plan
from benchmarks.evidence.outcomes import Family, has, told
from paec_kernels.train.report.statistics import CONFIDENCE, Estimate, PairedComparison, bootstrap_interval, iqm
from paec_kernels.train.tasks.task import FORK, FREE, STEP

ALPHA = 0.05
IN_BATCHES = ("discovery",)  # all other scores are shares, shown in per cent
BESIDE = ("mean@16", "greedy", "reward")  # scores that the table of arms has and no comparison
PLACES = {FORK: "forks", STEP: "steps", FREE: "harmless choices"}


def arms(family: Family) -> Iterator[str]:
    """Tabulate each arm's outcomes over its seeds."""
    yield from table_header(["arm", "found", *plan.OUTCOMES, *BESIDE])
    starts = [seed % plan.WARM_STARTS for seed in family.seeds]
    for arm, by_seed in family.scores.items():
        values = {name: [by_seed[seed][name] for seed in family.seeds] for name in ("found", *plan.OUTCOMES, *BESIDE)}
        cells = [f"{sum(values['found']):.0f} of {len(family.seeds)}"]
        for name in (*plan.OUTCOMES, *BESIDE):
            middle = f", {shown(name, float(iqm(values[name])))}" if name in plan.OUTCOMES else ""
            cells.append(_estimate(name, bootstrap_interval(values[name], starts)) + middle)
        yield table_line([f"`{arm}`", *cells])
    yield ""


def comparisons(rows: list[PairedComparison]) -> Iterator[str]:
    """Tabulate the planned comparisons, and then the others: a line a pair, a column an outcome."""
    for planned, title in ((True, "Planned comparisons"), (False, "Exploratory, unadjusted")):
        own = [row for row in rows if row.planned is planned]
        if not own:
            continue
        yield from (f"{title}: difference [{100 * CONFIDENCE:g} % interval], p.", "")
        yield from table_header(["", *plan.OUTCOMES])
        for arm, baseline in dict.fromkeys((row.arm, row.baseline) for row in own):
            cells = [difference(row) for name in plan.OUTCOMES for row in only(own, name, arm, baseline)]
            yield table_line([f"`{arm}` - `{baseline}`", *cells])
        yield ""


def mechanisms(family: Family) -> Iterator[str]:
    """Tabulate what became of entropy and mask."""
    roles = [role for role in (FORK, STEP, FREE) if has(family, role)]
    span = outcomes.middle(family.batches)
    yield (
        f"Entropy, in nats: first batch -> batches {span.start + 1} to {span.stop}, when most runs have found nothing "
        "yet -> last tenth. All else: those batches -> last tenth. A floor for each position is active at this share "
        "of the mask's weight, any other in this share of the optimiser steps. The penalty's force is that of a token "
        "of mask 1, where its policy gradient has 1; the oracle counts forks alone, so its is left out."
    )
    yield ""
    yield from table_header(
        [
            "arm",
            *(f"entropy at {PLACES[role]}" for role in roles),
            *(f"mask at {PLACES[role]}" for role in roles),
            *("threshold", "mask's share on certain", "penalty active", "penalty a token", "H_bar / floor"),
        ]
    )
    for arm in family.runs:

        def cell(name: str, form: str, *times: str, scale: float = 1, unit: str = "", arm: str = arm) -> str:
            values = [scale * told(family, arm, f"{when} {name}") for when in times or outcomes.TIMES[1:]]
            return or_dash(values, form, unit)

        cells = [cell(f"entropy/{role}", ".3f", *outcomes.TIMES) for role in roles]
        cells += [cell(f"mask/{role}", ".2f") for role in roles]
        cells += [cell(name, ".2f") for name in outcomes.OF_MASK]
        active, force, ratio = outcomes.OF_PENALTY
        cells += [cell(active, ".0f", scale=100, unit=" %"), "-" if arm == "oracle" else cell(force, ".2f")]
        yield table_line([f"`{arm}`", *cells, cell(ratio, ".2f")])
    yield ""


def grids(families: Sequence[Family]) -> Iterator[str]:
    yield from ("## The grid", "")
    picks = [
        value in (arm.grid[0], arm.grid[-1])
        for family in families
        for name, arm in plan.ARMS.items()
        for value in arm.grid
        if family.chosen.get(name) == arm.spelled(value)
    ]
    yield (
        f"The mean {plan.PRIMARY} of each candidate, in per cent, over seeds {span(plan.GRID_SEEDS)}; bold: taken. Two "
        f"seeds choose badly, and {sum(picks)} of {len(picks)} choices lie at an edge of their grid: a better value "
        "may lie beyond, of any arm."
    )
    yield ""
    yield from table_header(["arm", "field", *(family.name for family in families)])
    for name, arm in plan.ARMS.items():
        cells = []
        for family in families:
            candidates = []
            for candidate, area in family.areas.get(name, {}).items():
                value = candidate.rpartition("=")[2] + ": " if arm.coefficient else ""
                mark = "**" if candidate == family.chosen[name] else ""
                candidates.append(f"{mark}{value}{shown(plan.PRIMARY, area)}{mark}")
            cells.append(", ".join(candidates) or "not run")
        yield table_line([f"`{name}`", f"`{arm.coefficient}`" if arm.coefficient else "", *cells])
    yield ""


def only(rows: Iterable[PairedComparison], outcome: str, arm: str, baseline: str) -> list[PairedComparison]:
    return [row for row in rows if (row.outcome, row.arm, row.baseline) == (outcome, arm, baseline)]


def difference(row: PairedComparison) -> str:
    p = f"p {row.p_value:.2g}"
    if row.planned:
        mark = "**" if row.adjusted_p_value <= ALPHA else ""
        p += f", adjusted {mark}{row.adjusted_p_value:.2g}{mark}"
    return f"{_estimate(row.outcome, row.difference, '+')}, {p}"


def _estimate(name: str, estimate: Estimate, sign: str = "") -> str:
    mean, low, high = (shown(name, value, sign) for value in estimate)
    return f"{mean} [{low}, {high}]"


def shown(name: str, value: float, sign: str = "") -> str:
    """Return a share in per cent, batches as they are."""
    number = f"{value:{sign}.1f}" if name in IN_BATCHES else f"{100 * value:{sign}.1f}"
    return f"{0:.1f}" if not float(number) else number  # no -0.0


def span(seeds: Sequence[int]) -> str:
    return f"{seeds[0]} to {seeds[-1]}"


def or_dash(values: Sequence[float], form: str, unit: str = "") -> str:
    return "-" if any(map(math.isnan, values)) else " -> ".join(f"{value:{form}}" for value in values) + unit


def table_header(names: Sequence[str]) -> Iterator[str]:
    yield table_line(names)
    yield table_line(["---", *["---:"] * (len(names) - 1)])


def table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
