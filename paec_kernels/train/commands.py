"""What the terminal shows of training, evaluation, comparison and inspection; each returns the process' exit status."""

import json
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from paec_kernels.losses.ranks import rank_and_world
from paec_kernels.saved_state import without_nan, write_json
from paec_kernels.train import loop
from paec_kernels.train.config import CompareConfig, EvalConfig, TrainConfig, plain
from paec_kernels.train.inspect import InspectConfig, make_report
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.policies import pick_device, starting_policy, trained_policy
from paec_kernels.train.presets import with_algo
from paec_kernels.train.report import plots, tables
from paec_kernels.train.report.compare import compare as compare_runs
from paec_kernels.train.report.evaluate import Settings
from paec_kernels.train.report.evaluate import evaluate as evaluate_policy
from paec_kernels.train.report.runs import find_runs, read_run
from paec_kernels.train.report.tokens import show
from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.task import Task

INTERRUPTED = 130  # the shell's status for SIGINT


def train(config: TrainConfig) -> int:
    """Train with a progress bar, then evaluate."""
    console = _console()
    # Before anything is made: it finds a wrong name.
    tasks, eval_tasks = config.load_tasks()
    try:
        with _progress(console) as progress:
            _make_start(config, progress)
            bar = progress.add_task("train", total=config.steps)

            def show(row: loop.Row) -> None:
                shown = "reward {reward:.2f}  entropy {entropy:.3f}  selected {selected_entropy:.2f}  floor {floor:.2f}"
                progress.update(bar, completed=row["step"], description=shown.format(**row))

            run = loop.train(config, show, tasks=tasks)
    except loop.Interrupted as stopped:
        console.print(f"{stopped}; the same command goes on from there ({config.out / 'checkpoint.pt'})")
        return INTERRUPTED
    _evaluate_run(config, run.policy, eval_tasks, console)
    return 0


def evaluate(config: EvalConfig) -> int:
    """Evaluate a run's last checkpoint or a model."""
    device = pick_device(config.device)
    if config.run is not None:
        policy = trained_policy(config.run, device)
        options = json.loads((config.run / "config.json").read_text())
        _, tasks = load_tasks(options["tasks"], config.tasks or options["eval_tasks"] or None)
    else:
        start = TrainConfig(model=config.model, chat=config.chat)
        options = plain(start)
        _, tasks = load_tasks((), config.tasks or start.tasks)
        with _progress(_console()) as progress:
            _make_start(start, progress)
        policy = starting_policy(start, device)
    settings = Settings(
        **asdict(config.evaluate),
        max_new_tokens=config.max_new_tokens or options["max_new_tokens"],
        temperature=config.temperature or options["temperature"],
    )
    _evaluate(policy, tasks, settings, config.out or config.run or Path("runs/eval"), _console())
    return 0


def compare(config: CompareConfig) -> int:
    """Train what is missing, then show the tables and write files and plots."""
    console = _console()
    if config.runs:
        folders = find_runs(config.runs)
    else:
        runs = [
            replace(with_algo(config.train, arm), seed=seed, out=config.out / "runs" / arm / str(seed))
            for seed in range(config.seeds)
            for arm in config.arms
        ]
        if not _train_all(runs, config.jobs, console):
            console.print("stopped; the same command goes on from the checkpoints")
            return INTERRUPTED
        folders = [run.out for run in runs]
    read = [read_run(folder, arm_fields=config.arm_fields) for folder in folders]
    comparison = compare_runs(read, arm_fields=config.arm_fields)
    for table in tables.format_comparison(comparison):
        console.print(table)
    written = tables.save(comparison, read, config.out) + plots.save_plots(comparison, read, config.out)
    console.print("wrote " + ", ".join(map(str, written)))
    return 0


def inspect(config: InspectConfig) -> int:
    """Make the report, show it and write it."""
    console = _console()
    with _progress(console) as progress:
        if config.run is None:
            _make_start(config.training(), progress)
        report = make_report(config, progress)
    show(report, console)
    path = config.out / "inspect.json"
    write_json(path, without_nan(report))
    console.print(f"wrote {path}")
    return 0


def _train_all(runs: list[TrainConfig], jobs: int, console: Console) -> bool:
    """Return whether all were trained and evaluated: False after SIGINT, which every process gets."""
    runs[0].load_tasks()
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with _progress(console) as progress, ProcessPoolExecutor(jobs, context) as pool:
        _make_start(runs[0], progress)
        bar = progress.add_task("runs", total=len(runs))
        for finished in as_completed([pool.submit(_train_one, run, threads) for run in runs]):
            if not finished.result():
                pool.shutdown(cancel_futures=True)
                return False
            progress.advance(bar)
    return True


def _make_start(config: TrainConfig, progress: Progress) -> None:
    """Make the tiny model's warm start, with a bar, unless it is cached."""
    if config.model != "tiny":
        return
    total = config.warm_start.skill_steps + config.warm_start.habit_steps
    bar = progress.add_task("warm start", total=total)
    starting_policy(config, torch.device("cpu"), lambda step, loss: progress.update(bar, completed=step + 1))
    progress.remove_task(bar)


def _train_one(config: TrainConfig, threads: int) -> bool:
    torch.set_num_threads(threads)
    try:
        tasks, eval_tasks = config.load_tasks()
        run = loop.train(config, tasks=tasks)
    except (loop.Interrupted, KeyboardInterrupt):
        return False
    if not (config.out / "eval.json").exists():
        _evaluate_run(config, run.policy, eval_tasks, Console(quiet=True))
    return True


def _evaluate_run(config: TrainConfig, policy: Policy, tasks: Sequence[Task], console: Console) -> None:
    settings = Settings(**asdict(config.evaluate), max_new_tokens=config.max_new_tokens, temperature=config.temperature)
    _evaluate(policy, tasks, settings, config.out, console)


def _evaluate(policy: Policy, tasks: Sequence[Task], settings: Settings, out: Path, console: Console) -> None:
    with _progress(console) as progress:
        bar = progress.add_task("evaluate")
        evaluation = evaluate_policy(
            policy, tasks, settings, on_progress=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    if not _is_first_process():
        return
    evaluation.save(out / "eval.json")
    console.print(tables.format_evaluation(evaluation))
    console.print(f"wrote {out / 'eval.json'}")


def _console() -> Console:
    return Console(highlight=False, quiet=not _is_first_process())


def _is_first_process() -> bool:
    return rank_and_world()[0] == 0


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console)
