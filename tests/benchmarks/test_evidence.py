"""The evidence's report says what its rows say and finds what is there alone; no run is lost or repeated."""

import itertools
import json
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_evidence import BATCHES, SAMPLES, made_row, made_rows
from scipy.stats import binom, trim_mean

from benchmarks.evidence import outcomes, plan, plots, report, rerun, run, words
from paec_kernels.train.report import statistics
from paec_kernels.train.tasks.families import Habits
from paec_kernels.train.tasks.long_families import LONG_FAMILIES

SEEDS = range(8)  # two of each warm start; of fewer pairs no p passes Holm
LEVELS = {"grpo": 0.5, "oracle": 0.97, "paec": 0.52}


@pytest.fixture(autouse=True)
def _small_plan(request, monkeypatch) -> None:
    if "published" in request.node.name:
        return
    arms = {
        "grpo": plan.Arm("nothing", "grpo"),
        "oracle": plan.Arm("told", "oracle", "paec.rho_min", (0.2, 0.4, 0.8)),
        "paec": plan.Arm("ours", "paec", "paec.lam", (1, 5, 25)),
    }
    monkeypatch.setattr(plan, "ARMS", arms)
    monkeypatch.setattr(plan, "SEEDS", SEEDS)
    monkeypatch.setattr(plan, "FAMILIES", ("chain", "chain+"))
    monkeypatch.setattr(statistics, "RESAMPLES", 200)


def page_of(folder: Path, **rows_of: list[run.Row]) -> str:
    for family, rows in rows_of.items():
        run.add(rows, family.replace("_free", "+"), folder)
    assert report.write(folder)[0] == folder / "README.md"
    return (folder / "README.md").read_text()


def section(page: str, title: str) -> str:
    return page[page.index(f"\n## {title}\n") :].partition("\n## ")[2].partition("\n## ")[0]


def table(text: str, header: str) -> dict[str, dict[str, str]]:
    """Return the first table whose header begins so, by the first cell of a line and the column."""
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()
    names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def main_rows(rows: list[run.Row], arm: str) -> list[run.Row]:
    return [row for row in rows if row["stage"] == "main" and row["arm"].partition(",")[0] == arm]


def area_of(row: run.Row) -> float:
    return sum(row["log"]["mostly_right"]) / BATCHES


def vote_of(row: run.Row, k: int = SAMPLES) -> float:
    """Return maj@k of all k samples in turn, ties shared."""
    scores = []
    for answers in row["answers"]:
        for start in range(0, SAMPLES, k):
            votes = Counter(answers[start : start + k]).most_common()
            winners = [answer for answer, count in votes if count == votes[0][1]]
            scores.append(("1" in winners) / len(winners))
    return sum(scores) / len(scores)


def discovery_of(row: run.Row) -> int:
    right = row["log"]["mostly_right"]
    means = [np.mean(right[end - plan.WINDOW : end]) for end in range(plan.WINDOW, BATCHES + 1)]
    return next((plan.WINDOW + i for i, m in enumerate(means) if m >= plan.DISCOVERED), BATCHES + 1)


def sign_flips(differences: list[float]) -> float:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= abs(sum(differences)) - 1e-9 for x in sums) / len(sums)


def test_the_cells_are_those_counted_by_hand(tmp_path) -> None:
    rows = made_rows(LEVELS, SEEDS)
    text = section(page_of(tmp_path, chain=rows), "chain")
    arms, compared = table(text, "| arm | found"), table(text, "|  | area")
    by_arm = {arm: main_rows(rows, arm) for arm in LEVELS}
    raw = {}
    for arm, own in by_arm.items():
        discoveries = [discovery_of(row) for row in own]
        cells = arms[f"`{arm}`"]
        assert cells["found"] == f"{sum(d <= BATCHES for d in discoveries)} of 8"
        for name, values, scale in (
            ("area", [area_of(row) for row in own], 100),
            ("discovery", discoveries, 1),
            ("maj@16", [vote_of(row) for row in own], 100),
        ):
            mean, _, rest = cells[name].partition(" [")
            assert mean == f"{scale * np.mean(values):.1f}", (arm, name)
            assert rest.rpartition("], ")[2] == f"{scale * trim_mean(values, 0.25):.1f}", (arm, name)
            low, high = map(float, rest.partition("]")[0].split(", "))
            assert low <= float(mean) <= high
        assert cells["mean@16"].startswith(f"{100 * np.mean([row['correct'] for row in own]):.1f} [")
        assert cells["greedy"].startswith(f"{100 * np.mean([row['greedy'] for row in own]):.1f} [")
        assert cells["reward"].startswith(f"{100 * np.mean([row['log']['reward'] for row in own]):.1f} [")
    differences = {
        arm: [area_of(one) - area_of(other) for one, other in zip(by_arm[arm], by_arm["grpo"], strict=True)]
        for arm in ("oracle", "paec")
    }
    raw = {arm: sign_flips(d) for arm, d in differences.items()}
    low, high = sorted(raw, key=raw.__getitem__)
    adjusted = {low: min(1, 2 * raw[low]), high: max(min(1, 2 * raw[low]), raw[high])}
    for arm in differences:
        cell = compared[f"`{arm}` - `grpo`"]["area"].replace("**", "")
        assert cell.startswith(f"{100 * np.mean(differences[arm]):+.1f} [")
        assert cell.endswith(f"], p {raw[arm]:.2g}, adjusted {adjusted[arm]:.2g}")


def test_the_mechanism_is_that_of_the_logs(tmp_path) -> None:
    rows = made_rows(LEVELS, SEEDS, family="chain+")
    text = section(page_of(tmp_path, chain_free=rows), "chain+")
    cells = table(text, "| arm | entropy")
    middle, end = slice(4, 8), slice(-2, None)  # of 20 batches
    for arm in LEVELS:
        logs = [row["log"] for row in main_rows(rows, arm)]
        for role, where in (("fork", "forks"), ("step", "steps"), ("free", "harmless choices")):
            values = [np.mean([log[f"entropy/{role}"][part] for log in logs]) for part in (slice(1), middle, end)]
            assert cells[f"`{arm}`"][f"entropy at {where}"] == " -> ".join(f"{value:.3f}" for value in values)
            values = [np.mean([log[f"mask/{role}"][part] for log in logs]) for part in (middle, end)]
            assert cells[f"`{arm}`"][f"mask at {where}"] == " -> ".join(f"{value:.2f}" for value in values)
        values = [np.mean([log["threshold"][part] for log in logs]) for part in (middle, end)]
        assert cells[f"`{arm}`"]["threshold"] == " -> ".join(f"{value:.2f}" for value in values)
    logs = [row["log"] for row in main_rows(rows, "paec")]
    active = [100 * np.mean([log["term/penalty_active"][part] for log in logs]) for part in (middle, end)]
    assert cells["`paec`"]["penalty active"] == " -> ".join(f"{value:.0f}" for value in active) + " %"
    ratios = [np.mean([log["term/floor_ratio"][part] for log in logs]) for part in (middle, end)]
    assert cells["`paec`"]["H_bar / floor"] == " -> ".join(f"{value:.2f}" for value in ratios)
    assert cells["`grpo`"]["penalty active"] == cells["`grpo`"]["penalty a token"] == "-"
    assert cells["`oracle`"]["penalty a token"] == "-" != cells["`oracle`"]["penalty active"]


def test_scores_for_each_k() -> None:
    row = made_row("main", "grpo", 0, 0.5)
    found = outcomes.scores(row)
    correct = np.array(row["correct"])
    assert found["pass@16"] == correct.any(1).mean()
    assert found["pass@1"] == found["maj@1"] == pytest.approx(found["mean@16"])
    chosen = [
        any(of_problem[i] for i in pick) for of_problem in correct for pick in itertools.combinations(range(SAMPLES), 2)
    ]
    assert found["pass@2"] == pytest.approx(np.mean(chosen))  # over all pairs: unbiased
    for k in (2, 4, 8, 16):
        assert found[f"maj@{k}"] == pytest.approx(vote_of(row, k))


def test_a_planted_win_is_found(tmp_path) -> None:
    rows = {family: made_rows(LEVELS, SEEDS, family=family) for family in ("chain", "chain+")}
    page = page_of(tmp_path, chain=rows["chain"], chain_free=rows["chain+"])
    shown = section(page, "What this shows")
    assert "`oracle` is above `grpo` in 2 (chain, chain+) of 2 families, below it in none. All together: +" in shown
    assert "`oracle` is earlier than `grpo` in 2 (chain, chain+) of 2 families, later than it in none" in shown
    together = table(section(page, "All families together"), "|  | area")["`oracle` - `grpo`"]["area"]
    areas = {arm: np.mean([[area_of(row) for row in main_rows(of, arm)] for of in rows.values()]) for arm in LEVELS}
    pooled = areas["oracle"] - areas["grpo"]
    assert together.startswith(f"{100 * pooled:+.1f} [")
    assert together.endswith("adjusted **0.016**")  # 2 of the 2^8 signs, and 2 comparisons
    starts = section(page, "All families together").partition("over warm starts")[2]
    cell = table(starts, "|  | area")["`oracle` - `grpo`"]["area"]
    assert cell == f"{100 * pooled:+.1f}, p 0.0078"  # 2 of the signs of 4 starts of 2 families
    assert (tmp_path / "summary.png").stat().st_size > 10_000


def test_arms_renamed_at_random_win_by_chance_alone(monkeypatch) -> None:
    """Rows of arms that do differ, each seed's handed out to the arms at random: so no arm is better by its name."""
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    family = outcomes.gather("chain", made_rows(LEVELS, SEEDS))
    rng, trials, wins = np.random.default_rng(0), 300, 0
    for _ in range(trials):
        renamed: dict = {arm: {} for arm in family.runs}
        for seed in SEEDS:
            for arm, other in zip(renamed, rng.permutation(list(renamed)), strict=True):
                renamed[arm][seed] = family.scores[other][seed]
        of_primary = [row for row in report.compared(renamed) if row.outcome == plan.PRIMARY]
        assert len(of_primary) == 2
        wins += any(row.adjusted_p_value <= 0.05 for row in of_primary)
    assert wins <= binom.ppf(0.999, trials, 0.05)


def test_what_is_missing_is_said(tmp_path) -> None:
    page = page_of(tmp_path)
    assert "Not run yet: chain (nothing so far), chain+ (nothing so far)." in page
    assert "|" not in page
    rows = [row for row in made_rows(LEVELS, SEEDS) if not (row["arm"].startswith("paec") and row["stage"] == "main")]
    few = main_rows(made_rows(LEVELS, SEEDS), "paec")[:3]
    page = page_of(tmp_path, chain=rows + few)
    assert "Not run yet: chain+ (nothing so far)." in page
    assert "Not run yet in chain: `paec` (3 of 8 seeds)." in page
    assert "`paec` -" not in page
    assert "All families together" not in page


def test_a_grid_alone_is_no_result(tmp_path) -> None:
    rows = made_rows({}, SEEDS)
    page = page_of(tmp_path, chain=rows, chain_free=made_rows({}, SEEDS, family="chain+")[1:])
    assert f"Not run yet: chain (0 of the main runs so far), chain+ ({len(rows) - 1} runs of the grid so far)." in page


def test_an_arm_whose_grid_is_not_whole_is_not_run(tmp_path) -> None:
    rows = made_rows(LEVELS, SEEDS)
    lost = [row for row in rows if row["arm"].startswith("paec") and (row["stage"], row["seed"]) != ("grid", 100)]
    page = page_of(tmp_path, chain=[row for row in rows if row not in lost])
    assert "Not run yet in chain: `paec`." in page
    assert "| `paec` | `paec.lam` | not run |" in page


def test_fewer_seeds_than_planned_are_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "SEEDS", range(9))
    page = page_of(tmp_path, chain=made_rows(LEVELS, SEEDS))
    assert "Of chain 8 of the planned 9 seeds are in." in page


def spoilt(change) -> list[run.Row]:
    rows = made_rows(LEVELS, SEEDS)
    change(main_rows(rows, "paec")[3])
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row["log"].pop("entropy/fork"), "must log .* missing: entropy/fork"),
        (lambda row: [values.pop() for values in row["log"].values()], "must have 20 batches .* got 19"),
        (lambda row: row["log"]["reward"].pop(), "must have .* got 19 of 'reward'"),
        (lambda row: row["answers"].pop(), "must have 8 problems .* got 7"),
        (lambda row: row["correct"][2].pop(), r"must have 16 samples a problem, got \[15, 16\]"),
    ],
)
def test_rows_that_do_not_fit_are_refused_by_name(change, message) -> None:
    with pytest.raises(ValueError, match=f"row of 'chain', 'paec,paec.lam=25', seed 3 {message}"):
        outcomes.gather("chain", spoilt(change))


def test_a_run_of_no_arm_is_refused() -> None:
    rows = [*made_rows(LEVELS, SEEDS), made_row("main", "paec,paec.lam=1", 0, 0.5)]
    with pytest.raises(ValueError, match=r"row of 'chain', 'paec,paec.lam=1', seed 0 must be of an arm that the grid"):
        outcomes.gather("chain", rows)


def test_findings_stand_on_the_page_and_on_its_numbers(tmp_path) -> None:
    page = page_of(tmp_path, chain=made_rows(LEVELS, SEEDS))
    (tmp_path / "findings.md").write_text("Of 8 seeds all tell the same.\n")
    report.write(tmp_path)
    title, _, rest = page.partition("\n\n")
    assert (tmp_path / "README.md").read_text() == f"{title}\n\nOf 8 seeds all tell the same.\n\n{rest}"
    (tmp_path / "findings.md").write_text("Of 8 seeds 7654.3 do.\n")
    with pytest.raises(ValueError, match=r"findings.md must hold no number that the page has not, got 7654.3"):
        report.write(tmp_path)


def test_wanted_is_what_is_missing() -> None:
    everything = [(arm, seed) for seed in plan.GRID_SEEDS for a in plan.ARMS.values() for arm in a.candidates]
    assert run.wanted("chain", "grid", [], plan.ARMS) == everything
    assert len(everything) == len(set(everything)) == 2 * (1 + 3 + 3)
    rows = made_rows({}, ())
    assert run.wanted("chain", "grid", rows, plan.ARMS) == []
    gone = rows.pop(4)
    assert run.wanted("chain", "grid", rows, plan.ARMS) == [(gone["arm"], gone["seed"])]
    assert run.wanted("chain", "grid", rows, ["grpo", "paec"]) == []
    with pytest.raises(ValueError, match=r"whole grid of an arm before its main runs; missing: oracle$"):
        run.wanted("chain", "main", rows, plan.ARMS)
    assert run.wanted("chain", "main", rows, ["grpo"], SEEDS) == [("grpo", seed) for seed in SEEDS]
    rows.append(gone)
    best = ["grpo", "oracle,paec.rho_min=0.8", "paec,paec.lam=25"]
    assert run.wanted("chain", "main", rows, plan.ARMS, SEEDS) == [(arm, seed) for seed in SEEDS for arm in best]
    rows += [made_row("main", arm, seed, 0.5) for seed in SEEDS for arm in best if (arm, seed) != (best[1], 5)]
    assert run.wanted("chain", "main", rows, plan.ARMS, SEEDS) == [(best[1], 5)]
    assert run.wanted("chain", "main", rows, ["grpo"], range(10)) == [("grpo", 8), ("grpo", 9)]


def test_best_is_the_largest_area_and_of_equals_the_first() -> None:
    rows = made_rows({}, ())
    assert run.best(rows)["paec"] == "paec,paec.lam=25"
    for row in rows:
        if row["arm"] == "paec,paec.lam=5":
            row["log"]["mostly_right"] = [0.9] * BATCHES
    assert run.best(rows)["paec"] == "paec,paec.lam=5"
    for row in rows:
        row["log"]["mostly_right"] = [0.25] * BATCHES
    assert run.best(rows) == {"grpo": "grpo", "oracle": "oracle,paec.rho_min=0.2", "paec": "paec,paec.lam=1"}
    rows += [made_row("grid", "paec,paec.lam=25", 77, 1.0)]  # of no seed of the grid
    assert run.best(rows)["paec"] == "paec,paec.lam=1"
    lost = next(row for row in rows if row["arm"] == "paec,paec.lam=5")
    rows.remove(lost)
    assert run.best(rows) == {"grpo": "grpo", "oracle": "oracle,paec.rho_min=0.2"}


def test_rows_are_added_and_a_run_stands_once(tmp_path) -> None:
    first, second = made_row("main", "grpo", 0, 0.5), made_row("main", "grpo", 1, 0.5)
    assert run.read("chain", tmp_path) == []
    run.add([first], "chain", tmp_path)
    run.add([second], "chain", tmp_path)
    assert run.read("chain", tmp_path) == [first, second]
    run.add([first], "chain", tmp_path)
    with pytest.raises(ValueError, match=r"must hold a run once, got \('main', 'grpo', 0\) twice"):
        run.read("chain", tmp_path)


def test_a_run_of_the_family_as_it_was_is_refused(tmp_path) -> None:
    run.add([made_row("main", "grpo", 0, 0.5) | {"fingerprint": "0123456789ab"}], "chain", tmp_path)
    with pytest.raises(ValueError, match=r"'chain' as it is now, .* got \('main', 'grpo', 0\) of 0123456789ab"):
        run.read("chain", tmp_path)
    prints = {plan.fingerprint(name) for name in LONG_FAMILIES}
    assert len(prints) == len(LONG_FAMILIES)


def test_a_run_with_other_options_is_refused(tmp_path) -> None:
    row = made_row("main", "grpo", 0, 0.5)
    run.add([row | {"config": row["config"] | {"learning_rate": 1.0}}], "chain", tmp_path)
    with pytest.raises(ValueError, match=r"must hold runs with the options .* got \('main', 'grpo', 0\) with .* 1\.0"):
        run.read("chain", tmp_path)


def test_every_arm_is_drawn_once_beside_the_baseline() -> None:
    arms = [*LEVELS, *(f"other-{i}" for i in range(15))]
    groups = plots.groups_of(arms)
    assert groups[0][:3] == ["grpo", "oracle", "paec"]
    assert all(group[0] == "grpo" and len(group) <= plots.LEGIBLE for group in groups)
    assert sorted(arm for group in groups for arm in group[1:]) == sorted(set(arms) - {"grpo"})
    assert plots.groups_of(["grpo"]) == [["grpo"]]


@pytest.mark.parametrize("name", LONG_FAMILIES)
def test_what_was_asked_is_a_problem_that_needs_a_rare_route(name) -> None:
    family = replace(outcomes.gather("chain", made_rows(LEVELS, SEEDS)), name=name)
    _, solution, marks, _ = "\n".join(words.what_was_asked([family])).split("```")[1].split("\n")
    needed = LONG_FAMILIES[name].needed(solution.partition(":")[0] + ":")
    assert set(needed) != {LONG_FAMILIES[name].routes[0]}
    assert "".join(letter for letter, mark in zip(solution, marks, strict=False) if mark == "^") == needed
    assert marks.count("~") == LONG_FAMILIES[name].roles.count("free")


def test_a_run_becomes_a_row(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process
    config = plan.config("chain+", tmp_path / "cache")
    shrunk = replace(
        config,
        steps=2,
        prompts=4,
        answers=2,
        warm_start=replace(config.warm_start, skill_steps=2, habit_steps=1, batch=8),
        evaluate=replace(config.evaluate, problems=3),
    )
    monkeypatch.setattr(plan, "config", lambda family, cache: shrunk)
    row = run.run_one("chain+", "main", "paec,paec.lam=5", 5, shrunk) | {"provenance": {}}
    run.add([row], "chain+", tmp_path)
    assert run.read("chain+", tmp_path) == [row]
    assert (row["warm_start"], row["config"]["method"]["paec"]["lam"]) == (1, 5)
    assert {len(values) for values in row["log"].values()} == {2}
    assert set(outcomes.NEEDED) <= row["log"].keys()
    assert set(outcomes.OF_PENALTY) <= row["log"].keys()
    assert np.shape(row["correct"]) == np.shape(row["answers"]) == (3, 16)
    assert set(plan.OUTCOMES) <= outcomes.scores({**row, "log": {k: v * 10 for k, v in row["log"].items()}}).keys()
    told = outcomes.mechanism({**row, "log": {k: v * 10 for k, v in row["log"].items()}})
    assert told["start entropy/fork"] > 0
    assert 0 <= told["end mask/step"] <= 1


def test_a_run_that_fails_is_lost_alone_and_asked_for_again(tmp_path, monkeypatch, capsys) -> None:
    fails = [True]

    def made(family, stage, arm, seed, common):
        if fails[0] and (family, arm, seed) == ("chain", "paec,paec.lam=5", 101):
            raise FloatingPointError("the gradient's norm is nan")
        return made_row(stage, arm, seed, 0.5, family=family)

    starts: list[tuple] = []
    monkeypatch.setattr(run, "run_one", made)
    monkeypatch.setattr(run, "make_start", lambda config: starts.append((config.tasks, config.warm_start.seed)))
    monkeypatch.setattr(run, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(jobs))
    monkeypatch.setattr(run, "provenance", lambda: {"commit": "made up"})
    arguments = ["grid", "--out", str(tmp_path), "--families", "chain", "chain+", "chain"]
    assert run.main([*arguments, "--minutes", "0"]) == 0
    assert run.read("chain", tmp_path) == starts == []
    assert run.main(arguments) == 1
    assert sorted(starts) == [((family,), start) for family in ("chain", "chain+") for start in (0, 1)]
    assert "chain paec,paec.lam=5 seed 101 failed: FloatingPointError" in capsys.readouterr().err
    assert (len(run.read("chain", tmp_path)), len(run.read("chain+", tmp_path))) == (13, 14)
    fails[0] = False
    assert run.main(arguments) == 0
    assert capsys.readouterr().out.count("\n") == 1
    rows = run.read("chain", tmp_path)
    assert len(rows) == 14
    assert rows[-1]["provenance"] == {"commit": "made up", "command": "python -m benchmarks.evidence.run grid"}
    with pytest.raises(ValueError, match="whole grid"):  # before the first run of any family
        run.main(["main", "--out", str(tmp_path / "empty")])


def test_a_run_made_again_is_the_same_and_its_answers_fit(tmp_path, monkeypatch, capsys) -> None:
    start = plan.config("chain", tmp_path / "cache").warm_start
    config = replace(
        plan.config("chain", tmp_path / "cache"),
        steps=2,
        prompts=4,
        answers=2,
        warm_start=replace(start, skill_steps=2, habit_steps=1, batch=8),
        evaluate=replace(plan.config("chain", tmp_path).evaluate, problems=2),
    )
    monkeypatch.setattr(plan, "config", lambda family, cache: config)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this process
    monkeypatch.setattr(run, "provenance", lambda: {"commit": "made up"})
    monkeypatch.setattr(rerun, "provenance", lambda: {"commit": "made up"})
    rows = [made_row("grid", "grpo", seed, 0.5) for seed in plan.GRID_SEEDS]
    row = run.run_one("chain", "main", "grpo", 5, config)
    run.add([*rows, row], "chain", tmp_path)
    asked = ["--families", "chain", "--arms", "grpo", "--seed", "5", "--out", str(tmp_path)]
    assert rerun.main(asked) == 0
    (found,) = json.loads((tmp_path / run.RERUNS).read_text())
    assert (found["same"], found["answers"]) == (len(row["log"]), 2 * 4 * 2)
    assert f"| chain | `grpo` | 5 | made up | {found['same']} of {found['same']} |" in "\n".join(report.again([found]))
    row["log"]["reward"][1] += 0.5
    (tmp_path / "chain.jsonl.xz").unlink()
    run.add([*rows, row], "chain", tmp_path)
    assert rerun.main(asked) == 1
    (found,) = json.loads((tmp_path / run.RERUNS).read_text())
    assert found["same"] == found["columns"] - 1
    with pytest.raises(ValueError, match=r"must hold the main run of 'grpo' with seed 6, got none"):
        rerun.rerun("chain", "grpo", 6, tmp_path, tmp_path)


def test_other_seeds_are_held_against_the_published_ones(tmp_path, monkeypatch) -> None:
    method = {"clip_low": 0.2}
    rows = [row | {"config": row["config"] | {"method": method}} for row in made_rows(LEVELS, SEEDS)]
    rows = [row for row in rows if row["stage"] == "grid" or row["arm"] == "grpo"]
    run.add(rows, "chain", tmp_path)
    areas = [area_of(row) for row in main_rows(rows, "grpo")]
    of_compare = SimpleNamespace(config={"tasks": ["chain"], "method": method}, seed=200)
    rewards = [min(areas), max(areas)]  # of two batches
    monkeypatch.setattr(rerun, "find_runs", lambda folders: folders)
    monkeypatch.setattr(rerun, "read_run", lambda path: of_compare)
    monkeypatch.setattr(rerun, "read_rows", lambda path: [{"mostly_right": reward} for reward in rewards])
    asked = ["--compared", str(tmp_path), "--out", str(tmp_path)]
    assert rerun.main(asked) == 0
    (found,) = json.loads((tmp_path / run.FRESH).read_text())
    assert (found["low"], found["area"], found["high"]) == pytest.approx((min(areas), np.mean(rewards), max(areas)))
    line = f"| chain | `grpo` | 200: {100 * found['area']:.1f} | {100 * min(areas):.1f} to {100 * max(areas):.1f} |"
    assert line in "\n".join(report.other_seeds([found]))
    rewards[0] = 1.0  # outside
    assert rerun.main(asked) == 1
    of_compare.seed = 3
    with pytest.raises(ValueError, match="must be of an arm that is published, with another seed, got seed 3"):
        rerun.main(asked)


@pytest.mark.parametrize("name", LONG_FAMILIES)
def test_an_answer_fits_where_each_letter_stands_as_in_solutions(name) -> None:
    family = LONG_FAMILIES[name]
    solution = family.solution(family.train_problem(2000), Habits(), random.Random(1))
    assert rerun.fits(name, solution)
    assert not rerun.fits(name, solution[1:])
    assert not rerun.fits(name, solution[1:] + solution[-1])
    assert not rerun.fits(name, "")


def published_rows() -> dict[str, list[run.Row]]:
    folder = Path(__file__).parents[2] / run.ROWS
    return {family: rows for family in plan.FAMILIES if (rows := run.read(family, folder))}


@pytest.mark.slow
def test_published_candidates_of_an_arm_are_different_runs() -> None:
    """A coefficient that changes nothing is none: so it was once with a floor that was never reached."""
    for family, rows in published_rows().items():
        for arm in plan.ARMS.values():
            own = [[row["log"] for row in rows if (row["stage"], row["arm"]) == ("grid", c)] for c in arm.candidates]
            assert all(one != other for one, other in itertools.combinations(filter(None, own), 2)), (
                family,
                arm.method,
            )


@pytest.mark.slow
def test_published_arms_renamed_at_random_win_by_chance_alone(monkeypatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 2)
    families = [outcomes.gather(name, rows) for name, rows in published_rows().items()]
    pooled = report.pool([family for family in families if isinstance(family, outcomes.Family)])
    own = [row for row in report.compared(pooled) if row.outcome == plan.PRIMARY and row.planned]
    assert any(row.adjusted_p_value <= 0.05 for row in own)
    rng, trials, wins = np.random.default_rng(0), 40, 0
    for _ in range(trials):
        renamed: dict = {arm: {} for arm in pooled}
        for seed in plan.SEEDS:
            for arm, other in zip(renamed, rng.permutation(list(renamed)), strict=True):
                renamed[arm][seed] = pooled[other][seed]
        of_primary = [row for row in report.compared(renamed) if row.outcome == plan.PRIMARY and row.planned]
        wins += any(row.adjusted_p_value <= 0.05 for row in of_primary)
    assert wins <= binom.ppf(0.999, trials, 0.05)


def test_the_readme_has_the_published_numbers() -> None:
    root = Path(__file__).parents[2]
    page = (root / run.ROWS / "README.md").read_text()
    (paragraph,) = re.findall(rf"\[{run.ROWS}\].*?\n\n", (root / "README.md").read_text(), re.DOTALL)
    shown = section(page, "What this shows")

    def together(arm: str, outcome: str) -> tuple[str, str]:
        (found,) = re.findall(
            rf"`{arm}` is above `grpo` in .*? All together: \+(\d+\.\d) .*?, p ([\d.e-]+),",
            shown.split(f"**{outcome}**")[1],
        )[:1]
        return found

    areas = {arm: together(arm, "area")[0] for arm in ("oracle", "paec", "paec-positions")}
    expected = [areas["oracle"], areas["paec"], *together("paec", "maj@16"), areas["paec-positions"]]
    assert re.findall(r"\d+\.\d+", paragraph) == expected
    families = re.findall(r"^## (\w+\+?)\n", page, re.MULTILINE)
    assert [name for name in families if name in LONG_FAMILIES] == list(LONG_FAMILIES)
    assert "six families, sixteen seeds an arm" in paragraph
    assert "in two families no test tells it from GRPO" in paragraph
    above = "`paec-positions` is above `grpo` in 4 (chain, chain+, carry, carry+) of 6 families, below it in none."
    assert above in shown.split("**discovery**")[0]


@pytest.mark.slow
def test_the_published_page_is_that_of_the_published_rows(tmp_path) -> None:
    folder = Path(__file__).parents[2] / run.ROWS
    files = [*folder.glob("*.jsonl.xz"), folder / "findings.md", folder / run.RERUNS, folder / run.FRESH]
    if not any(file.suffix == ".xz" for file in files):
        pytest.skip("no rows of the long families are published yet")
    for file in filter(Path.exists, files):
        (tmp_path / file.name).symlink_to(file)
    written = report.write(tmp_path)
    assert (tmp_path / "README.md").read_text() == (folder / "README.md").read_text()
    assert {path.name for path in written} == {"README.md", *(path.name for path in folder.glob("*.png"))}
