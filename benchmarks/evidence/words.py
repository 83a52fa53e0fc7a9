"""What the statistics say, and how the runs were made, in sentences."""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence import plan
from benchmarks.evidence.outcomes import TIMES, Family, has, mean, middle, told
from benchmarks.evidence.tables import ALPHA, IN_BATCHES, PLACES, difference, only, span, table_line
from paec_kernels.train.report.statistics import CONFIDENCE, PairedComparison
from paec_kernels.train.tasks.families import HARD_SHARE
from paec_kernels.train.tasks.long_families import LONG_FAMILIES, Pen
from paec_kernels.train.tasks.task import FORK, FREE, STEP


def not_run(families: Sequence[Family], missing: dict[str, str]) -> Iterator[str]:
    lines = []
    if missing:
        lines.append(f"Not run yet: {', '.join(f'{name} ({found} so far)' for name, found in missing.items())}.")
    few: dict[str, list[str]] = {}
    for family in families:
        arms = ", ".join(
            f"`{arm}`" + (f" ({count} of {len(plan.SEEDS)} seeds)" if count else "")
            for arm, count in family.few.items()
        )
        few.setdefault(arms, []).append(family.name)
    lines += [f"Not run yet in {', '.join(names)}: {arms}." for arms, names in few.items() if arms]
    for family in families:
        if len(family.seeds) < len(plan.SEEDS):
            lines.append(f"Of {family.name} {len(family.seeds)} of the planned {len(plan.SEEDS)} seeds are in.")
    for line in lines:
        yield from (line, "")


def what_this_shows(
    families: Sequence[Family], within: dict[str, list[PairedComparison]], pooled: list[PairedComparison]
) -> Iterator[str]:
    """Say in words what the statistics say, and no more."""
    if not families:
        return
    yield from ("## What this shows", "")
    yield from (f"At an adjusted p of {ALPHA:g} at most, each family and outcome by itself:", "")
    for outcome in plan.OUTCOMES:
        yield f"- {_title(outcome)}:"
        for arm, baseline in plan.PLANNED:
            found = {name: row for name, rows in within.items() for row in only(rows, outcome, arm, baseline)}
            if found:
                yield f"  - {_verdict(found, only(pooled, outcome, arm, baseline))}"
    yield ""
    yield from _exploratory(within, plan.PRIMARY)
    yield from (*_of_mechanism(families), "")


def _title(outcome: str) -> str:
    unit = "batches" if outcome in IN_BATCHES else "percentage points"
    return f"**{outcome}**{', the primary outcome' if outcome == plan.PRIMARY else ''} (differences in {unit})"


def _verdict(found: dict[str, PairedComparison], pooled: list[PairedComparison]) -> str:
    """Say in how many families an arm differs from its baseline, the better side first."""
    low = {name: row for name, row in found.items() if row.adjusted_p_value <= ALPHA}
    row = next(iter(found.values()))
    sentence = f"`{row.arm}` is {_sides(low, row, len(found))}."
    return sentence + "".join(f" All together: {difference(row)}." for row in pooled)


def _exploratory(within: dict[str, list[PairedComparison]], outcome: str) -> Iterator[str]:
    """Name the arms beside the planned comparisons that differ from the baseline, as if each were the only one."""
    arms: dict[str, dict[str, PairedComparison]] = {}
    for name, rows in within.items():
        for row in rows:
            if not row.planned and row.outcome == outcome and row.baseline == plan.BASELINE:
                arms.setdefault(row.arm, {})[name] = row
    low = {arm: {name: row for name, row in found.items() if row.p_value <= ALPHA} for arm, found in arms.items()}
    count = sum(map(len, arms.values()))
    if not count:
        return
    yield (
        f"Exploratory, in {outcome}: of {count} further comparisons with `{plan.BASELINE}` "
        f"{sum(map(len, low.values()))} have an unadjusted p of {ALPHA:g} at most. Of as many that hold nothing but "
        f"noise about {ALPHA * count:.1f} would."
    )
    yield ""
    told_of = {arm: found for arm, found in low.items() if found}
    for arm, found in told_of.items():
        yield f"- `{arm}` is {_sides(found, next(iter(found.values())), len(arms[arm]))}."
    if told_of:
        yield ""


def _sides(low: dict[str, PairedComparison], row: PairedComparison, count: int) -> str:
    """Say on which side of its baseline an arm is in the families of ``low``, of ``count`` families."""
    sides = {1: "above", -1: "below"}
    if row.outcome in IN_BATCHES:
        sides = {-1: "earlier than", 1: "later than"}
    parts: list[str] = []
    for sign, word in sides.items():
        names = [name for name, each in low.items() if sign * each.difference.mean > 0]
        where = f"{len(names)} ({', '.join(names)})" if names else "none"
        parts.append(f"{word} {'it' if parts else f'`{row.baseline}`'} in {where}")
    return f"{parts[0]} of {count} {'family' if count == 1 else 'families'}, {parts[1]}"


def _of_mechanism(families: Sequence[Family]) -> Iterator[str]:
    """Say what became of entropy under the arms of the planned comparisons, as means over families and seeds."""
    arms = [arm for arm in plan.ARMS if arm in plan.PLANNED_ARMS]
    window = middle(families[0].batches)
    yield (
        f"What became of entropy, in nats, as means over families and seeds: first batch -> batches {window.start + 1} "
        f"to {window.stop}, when most runs have found nothing yet -> last tenth."
    )
    yield ""
    for role in (FORK, STEP, FREE):
        changes = []
        for arm in arms:
            own = [family for family in families if arm in family.runs and has(family, role)]
            if own:
                values = (mean(told(f, arm, f"{when} entropy/{role}") for f in own) for when in TIMES)
                changes.append(f"`{arm}` {' -> '.join(f'{value:.3f}' for value in values)}")
        if changes:
            yield f"- At {PLACES[role]}: {', '.join(changes)}."


def what_was_asked(families: Sequence[Family]) -> Iterator[str]:
    """Show a problem, and say what the words of this page mean."""
    family = LONG_FAMILIES[families[0].name]
    problem = next(p for p in map(family.train_problem, range(100)) if family.needed(p.prompt)[-1] != family.routes[0])
    pen = Pen(random.Random(0), slip=0.0, free=family.free)
    family.script(problem.prompt, family.needed(problem.prompt), pen)
    marks = "".join({FORK: "^", STEP: " ", FREE: "~"}[role] for role in pen.roles)
    yield from ("## What was asked", "")
    yield from ("A problem and its solution; `^` marks forks, `~` harmless choices:", "", "```")
    yield f"{problem.prompt}{''.join(pen.letters)}"
    yield f"{' ' * len(problem.prompt)}{marks}".rstrip()
    yield from ("```", "")
    yield f"""\
At a **fork** the policy picks a route, a letter. The **steps** after it follow the route, with one right letter each.
**Harmless choices**, words and separators in the families with a `+`, change nothing. The initial policy takes the
common route nearly always, and {100 * HARD_SHARE:g} % of the problems need a **rare** one: a policy that stops trying
it at the forks never finds it. A run has **found** the rare routes (discovered them) when {100 * plan.DISCOVERED:g} %
of the prompts are answered right mostly, over {plan.WINDOW} batches: the easy half, and half of the hard one. **area**
is the mean of that share over all batches; it grows with how soon and how well. **H_bar** is the mean entropy under
the mask, which PAEC keeps above its **floor**."""
    yield from ("", "| arm | what it is | tuned |", "| --- | --- | --- |")
    for name, arm in plan.ARMS.items():
        yield table_line([f"`{name}`", arm.what, f"`{arm.coefficient}`" if arm.coefficient else ""])
    yield ""


def how_it_was_run(families: Sequence[Family]) -> Iterator[str]:
    made = [each for family in families for each in family.made]
    config, *others = [replace(plan.config(family.name, Path()), tasks=("chain",)) for family in families]
    assert all(other == config for other in others)  # the page describes one
    start = config.warm_start
    dates = sorted(each["date"] for each in made)
    seeds = sorted({seed for family in families for seed in family.seeds})
    planned = ", ".join(f"`{arm}` against `{baseline}`" for arm, baseline in plan.PLANNED)
    yield from ("## How it was run", "", "```", *_values(made, "command"), "```", "")
    yield f"""\
{len(made)} runs, each on one core: {sum(each["seconds"] for each in made) / 3600:.1f} core-hours.
Commit {", ".join(_values(made, "commit"))}; {dates[0]} to {dates[-1]};
python {", ".join(_values(made, "python"))}, torch {", ".join(_values(made, "torch"))};
{"; ".join(_values(made, "machine"))}.

- **Families**, of `paec_kernels/train/tasks/long_families.py`. An answer is right only if its routes and all of its
  steps are; {100 * HARD_SHARE:g} % of the problems need rare routes."""
    for family in families:
        yield f"  - {_family_in_words(family.name)}"
    yield f"""\
- **Model**: the tiny model, {start.layers} layers of width {start.width}, after {start.skill_steps} supervised steps
  that teach all routes and {start.habit_steps} that teach the common one. Each family has {plan.WARM_STARTS} such
  starts; seed s begins with that of s modulo {plan.WARM_STARTS}. A seed also sets problems and sampling, alike for all
  arms.
- **Training**: {config.steps} batches of {config.prompts} prompts with {config.answers} answers each, {config.updates}
  optimiser steps a batch, learning rate {config.learning_rate:g}; the reward is that an answer is right.
- **Arms**: one coefficient of each is the best of a grid, by {plan.PRIMARY}, on seeds of their own
  ({span(plan.GRID_SEEDS)}); the main runs have the seeds {span(seeds)}. The grid's seeds begin with
  {len(plan.GRID_SEEDS)} of the {plan.WARM_STARTS} warm starts, which half of the main runs have too. All else is at the
  defaults.
- **Outcomes**: {plan.PRIMARY} over all families together decides; single families and the other outcomes tell where and
  how. `discovery` is the batch at which the rare routes are found; a run that never gets there counts as its batches
  + 1, and "found" counts those that do. `reward` is the mean over all batches. The others are of problems that training
  never sees. `discovery` is in batches, all else in per cent.
- **Statistics**: {100 * CONFIDENCE:g} % bootstrap intervals over seeds, resampled among those of a warm start. Of so
  few seeds they hold the mean in 90 % of cases or so: the tests decide. IQM is the interquartile mean. Differences are
  paired by seed; p is a sign-flip test's. Planned before the runs: {planned}. Their p are adjusted by Holm within an
  outcome. All else is exploratory, its p unadjusted. Seeds are about these {plan.WARM_STARTS} warm starts of a family;
  what holds for others is tested with a warm start as a pair, of which there are fewer.
"""


def _family_in_words(name: str) -> str:
    family = LONG_FAMILIES[name]
    does = (family.script.__doc__ or "").partition("\n")[0]
    count = {role: family.roles.count(role) for role in (FORK, FREE)}
    forks = "1 fork" if count[FORK] == 1 else f"{count[FORK]} forks"
    rare = len(family.routes) - 1
    habit = (
        f"with {rare + 1} routes, of which the habit takes {'the' if rare == 1 else 'each'} rare one with a share of "
    )
    free = f", {count[FREE]} of them harmless choices" if count[FREE] else ""
    hint = f"of the worked solutions that teach all routes {100 * family.hint:g} % take the ones that are needed"
    return f"**{name}**: {does} {forks} {habit}{family.rare:g}; {hint}; answers of {len(family.roles)} tokens{free}."


def _values(made: Iterable[dict[str, str]], name: str) -> list[str]:
    return sorted({each[name] for each in made})
