"""A real language model for some dozen batches: what mask and floor do there. One seed an arm, so no comparison.

python -m benchmarks.evidence.real_model --minutes 8
python -m benchmarks.evidence.real_model --minutes 0     # the page from its rows, nothing else
python -m benchmarks.evidence.real_model --precision bfloat16 --prompts 4 --answers 4 --max-new-tokens 48  # on a CPU

The arms take turns of a few batches, so that a page of all of them is there soon; the same command goes on from their
checkpoints. What is published is in ``bench_results/rlvr/smollm2/``.
"""

import argparse
import json
import lzma
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence.outcomes import known_mean
from benchmarks.evidence.plots import OWN, legend_of, panels_of, save
from benchmarks.evidence.run import Row, rounded, rows_in
from benchmarks.evidence.tables import or_dash, table_header, table_line
from benchmarks.provenance import device_name, provenance
from paec_kernels.saved_state import whole_file
from paec_kernels.train import loop
from paec_kernels.train.commands import INTERRUPTED
from paec_kernels.train.config import TrainConfig
from paec_kernels.train.presets import PRESETS, with_arm
from paec_kernels.train.report.plots import STYLES
from paec_kernels.train.run_folder import count_rows, read_rows

FOLDER = Path("bench_results/rlvr/smollm2")
ROWS, PAGE, PICTURE = "rows.jsonl.xz", "README.md", "curves.png"
ARMS = {  # as `paec compare` spells them, their coefficients at the defaults
    "grpo": "grpo",
    "paec": "paec",
    "paec-no-mask": "paec-no-mask",
    "paec-positions": "paec,paec.anchored=positions",
}
TASKS = PRESETS["smollm2"].tasks[:3]
TURN = 5  # batches that an arm trains before the next one's turn
# Columns of the page's table: name, heading, format.
MEANS = (
    ("threshold", "threshold", ".2f"),
    ("mean_mask", "mean mask", ".2f"),
    ("mask_on_certain", "mask's share on certain", ".3f"),
    ("floor_ratio", "H_bar / floor", ".2f"),
    ("penalty_active", "penalty active, share", ".2f"),
    ("bonus_per_token", "bonus a token", ".3f"),
    ("penalty_per_token", "penalty a token", ".3f"),
)
CURVES = {"entropy": "entropy, nats", "mean_entropy": "H_bar, nats", "threshold": "threshold"}
# Columns of the log by the name that they have here: an arm's own, or of an arm without a mask those of the PAEC at its
# defaults that looks on.
KEPT = {
    name: (f"term/{name}", "selected_entropy" if name == "mean_entropy" else name)
    for name in (
        *("reward", "mixed_groups", "response_length", "truncated", "gradient_norm", "seconds", "entropy"),
        *("mean_entropy", *(name for name, *_ in MEANS)),
    )
}


def config(arm: str, runs: Path, **options: Any) -> TrainConfig:
    """Return the options of an arm's run."""
    shared = replace(PRESETS["smollm2"], tasks=TASKS, checkpoint_every=TURN, **options)
    return replace(with_arm(shared, ARMS[arm]), out=runs / arm)


def train_in_turns(configs: dict[str, TrainConfig], until: float) -> Iterator[str]:
    """Train each arm to its number of steps, ``TURN`` at a time, and yield it after each turn; no turn begins after
    ``until``."""
    steps = min(each.steps for each in configs.values())
    for end in [*range(TURN, steps, TURN), steps]:
        for arm, each in configs.items():
            if time.time() >= until:
                return
            if count_rows(each.out) < end:
                loop.train(replace(each, steps=end))
                yield arm


def row_of(arm: str, config: TrainConfig, made: list[dict[str, str]]) -> Row:
    """Return what is kept of an arm's run so far.

    Args:
        made: where its parts were made, in order.
    """
    steps = read_rows(config.out)
    log = {}
    for name, columns in KEPT.items():
        if column := next((column for column in columns if column in steps[0]), None):
            log[name] = [None if step[column] is None else rounded(step[column]) for step in steps]
    return {"arm": arm, "config": config.identity(), "log": log, "provenance": made}


def write_rows(rows: Sequence[Row], folder: Path) -> None:
    with whole_file(folder / ROWS) as partial, lzma.open(partial, "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def published(folder: Path) -> list[Row]:
    return rows_in(folder / ROWS)


def write_page(folder: Path = FOLDER) -> None:
    """Write the page and its picture from the rows alone."""
    rows = published(folder)
    save(picture(rows), folder / PICTURE)
    with whole_file(folder / PAGE) as partial:
        partial.write_text("\n".join(text(rows)))


def text(rows: Sequence[Row]) -> Iterator[str]:
    batches = min(len(row["log"]["reward"]) for row in rows)
    options = rows[0]["config"]
    yield from ("# SmolLM2-135M: what mask and floor do on real text", "")
    yield "Written by `python -m benchmarks.evidence.real_model` from the rows beside it: no figure is typed by hand."
    yield ""
    tasks = ", ".join(f"`{task}`" for task in options["tasks"])
    yield (
        f"The first {batches} batches of each arm, of {options['prompts']} prompts with {options['answers']} answers "
        f"of at most {options['max_new_tokens']} tokens, {options['updates']} optimiser steps a batch, learning rate "
        f"{options['learning_rate']:g}, precision `{options['precision']}`, on {tasks}. One seed: numbers of the "
        "mechanism, not a comparison of arms. First -> last: means of the first and of the last fifth of the batches; "
        "all else is the mean over all batches; entropies in nats. Bonus and penalty are what the entropy of a token "
        "of mask 1 weighs where its policy gradient weighs 1. Mask and H_bar are an arm's own, and of `grpo`, which "
        "has none, those of PAEC at its defaults. Penalty: its form, lam and rho_min."
    )
    yield ""
    yield from table_header(
        ["arm", "penalty", "reward", "mixed groups", "entropy", "H_bar", *(heading for _, heading, _ in MEANS)]
    )
    for row in rows:
        log = {name: np.array(values[:batches], dtype=float) for name, values in row["log"].items()}
        fifth = max(1, batches // 5)
        own = row["config"]["method"].get("paec")
        cells = [f"{own['penalty']}, {own['lam']:g}, {own['rho_min']:g}" if own else "-"]
        cells += [
            f"{np.nanmean(log[name][:fifth]):.2f} -> {np.nanmean(log[name][-fifth:]):.2f}"
            for name in ("reward", "mixed_groups", "entropy", "mean_entropy")
        ]
        for name, _, form in MEANS:
            cells.append(or_dash([known_mean(log[name]) if name in log else np.nan], form))
        yield table_line([f"`{row['arm']}`", *cells])
    yield from ("", f"![curves]({PICTURE})", "")
    for made in {json.dumps(each): each for row in rows for each in row["provenance"]}.values():
        yield f"- `{made['command']}`: commit {made['commit']}, {made['date']}, {made['device']}, torch {made['torch']}"
    yield ""


def picture(rows: Sequence[Row]) -> Figure:
    """Draw entropy, the masked mean and the threshold over all batches of each arm."""
    figure, panels = panels_of(13, len(CURVES), 3.8)
    for row in rows:
        for axes, (name, label) in zip(panels, CURVES.items(), strict=True):
            values = np.array(row["log"][name], dtype=float)
            axes.plot(np.arange(1, len(values) + 1), values, label=row["arm"], **(STYLES | OWN)[row["arm"]])
            axes.set(title=label, xlabel="batch")
    legend_of(figure, "SmolLM2-135M, one seed an arm")
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = PRESETS["smollm2"]
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no turn after these")
    parser.add_argument("--steps", type=int, default=40, help="batches of each arm")
    for name in ("prompts", "answers", "max_new_tokens", "micro_batch"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(default, name))
    parser.add_argument(
        "--precision", choices=get_args(get_type_hints(TrainConfig)["precision"]), default=default.precision
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"), help="folder of checkpoints")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the rows, the page and its picture")
    asked = vars(parser.parse_args(arguments))
    until, out, runs = time.time() + 60 * asked.pop("minutes"), asked.pop("out"), asked.pop("runs")
    configs = {arm: config(arm, runs, **asked) for arm in ARMS}
    made = provenance()
    made["device"] = device_name("cuda" if loop.pick_device("auto").type == "cuda" else "cpu")
    rows = {row["arm"]: row for row in published(out)}
    try:
        for arm in train_in_turns(configs, until):
            before = rows[arm]["provenance"] if arm in rows else []
            rows[arm] = row_of(arm, configs[arm], before if made in before else [*before, made])
            write_rows([rows[name] for name in ARMS if name in rows], out)
            print(f"{arm}: {count_rows(configs[arm].out)} batches", flush=True)
    except loop.Interrupted as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    if rows:
        write_page(out)
        print(f"wrote {out / PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
