"""What the command does and shows, each a function that returns the process' exit status."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from pathlib import Path

import torch

from paec_kernels.extras import extra
from paec_kernels.losses.ranks import rank_and_world
from paec_kernels.saved_state import without_nan, write_json
from paec_kernels.train import loop
from paec_kernels.train.config import CompareConfig, EvalConfig, ExportConfig, TrainConfig, plain
from paec_kernels.train.inspect import InspectConfig, make_report
from paec_kernels.train.models.policy import Policy
from paec_kernels.train.out_folder import held
from paec_kernels.train.policies import pick_device, save_pretrained, starting_policy, trained_policy
from paec_kernels.train.presets import with_arm_and_seed
from paec_kernels.train.progress import progress
from paec_kernels.train.report import plots, tables
from paec_kernels.train.report.compare import compare as compare_runs
from paec_kernels.train.report.evaluate import Evaluation, Settings, check_names
from paec_kernels.train.report.evaluate import evaluate as evaluate_policy
from paec_kernels.train.report.runs import find_runs, read_run
from paec_kernels.train.report.tokens import show
from paec_kernels.train.run_folder import CHECKPOINT, MODEL, count_rows, read_config
from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.task import Task

with extra("train"):
    from rich.console import Console
    from rich.progress import Progress

INTERRUPTED = 130  # the shell's status for SIGINT
SECONDS_BETWEEN_LOOKS = 2.0
FIGURES = "reward {reward:.2f}  entropy {entropy:.3f}  selected {selected_entropy:.2f}  floor {floor:.2f}"


def train(config: TrainConfig) -> int:
    """Train, evaluate, and write a Hugging Face model as such."""
    console = _console()
    # Before anything is made: it finds a wrong name.
    tasks, eval_tasks = _load_tasks(config)
    with held(config.out):
        try:
            with progress(console) as shown:
                _make_start(config, shown)
                bar = shown.add_task("train", total=config.steps)

                def show(row: loop.Row) -> None:
                    shown.update(bar, completed=row["step"], figures=FIGURES.format(**row))

                def say(steps_done: int) -> None:
                    if not console.is_terminal:
                        console.print(f"saved step {steps_done} in {config.out / CHECKPOINT}", soft_wrap=True)

                run = loop.train(config, show, say, tasks=tasks)
        except loop.Interrupted as stopped:
            console.print(f"{stopped}; the same command goes on from there ({config.out / CHECKPOINT})")
            return INTERRUPTED
        _evaluate(run.policy, eval_tasks, Settings.after(config), config.out, console)
        _export(run.policy, config.out, console)
    return 0


def evaluate(config: EvalConfig) -> int:
    """Evaluate a run's last checkpoint or a model."""
    console = _console()
    if config.run is not None:
        options = read_config(config.run, ["tasks", "eval_tasks", "max_new_tokens", "temperature"])
        _, tasks = load_tasks(options["tasks"], config.tasks or options["eval_tasks"] or None)
    else:
        start = TrainConfig(model=config.model, chat=config.chat)
        options = plain(start)
        _, tasks = load_tasks((), config.tasks or start.tasks)
    check_names(tasks)
    settings = Settings(
        **asdict(config.evaluate),
        max_new_tokens=config.max_new_tokens or options["max_new_tokens"],
        temperature=config.temperature or options["temperature"],
    )
    device = pick_device(config.device)
    out = config.out or config.run or Path("runs/eval")
    with held(out):
        if config.run is not None:
            policy = trained_policy(config.run, device)
        else:
            start = replace(start, tasks=config.tasks or start.tasks)  # whose names have been checked
            with progress(console) as shown:
                _make_start(start, shown)
            policy = starting_policy(start, device)
        _evaluate(policy, tasks, settings, out, console)
    return 0


def compare(config: CompareConfig) -> int:
    """Train what is missing, then show the tables and write files and plots."""
    console = _console()
    with held(config.out):
        if config.runs:
            read = [read_run(folder, arm_fields=config.arm_fields) for folder in find_runs(config.runs)]
        else:
            seeds = range(config.first_seed, config.first_seed + config.seeds)
            runs = {
                (arm, seed): replace(
                    with_arm_and_seed(config.train, arm, seed, config.warm_starts),
                    out=config.out / "runs" / arm / str(seed),
                )
                for seed in seeds
                for arm in config.arms
            }
            if not _train_all(list(runs.values()), config.jobs, console):
                console.print("stopped; the same command goes on from the checkpoints")
                return INTERRUPTED
            read = [replace(read_run(run.out), arm=arm) for (arm, _), run in runs.items()]
        comparison = compare_runs(read, arm_fields=config.arm_fields)
        for table in tables.format_comparison(comparison):
            console.print(table)
        written = tables.save(comparison, read, config.out) + plots.save_plots(comparison, read, config.out)
        console.print("wrote " + ", ".join(map(str, written)))
    return 0


def inspect(config: InspectConfig) -> int:
    """Make the report, show it and write it."""
    console = _console()
    path = config.out / "inspect.json"
    with held(config.out):
        with progress(console) as shown:
            if config.run is None:
                _make_start(config.training(), shown)
            report = make_report(config, shown)
        show(report, console)
        write_json(path, without_nan(report))
        console.print(f"wrote {path}")
    return 0


def export(config: ExportConfig) -> int:
    """Write a run's last checkpoint as a Hugging Face model."""
    policy = trained_policy(config.run, torch.device("cpu"))
    with held(config.run):
        if not _export(policy, config.run, _console()):
            raise ValueError(f"run must be of a Hugging Face model, which the tiny model is not, got {config.run}")
    return 0


def _load_tasks(config: TrainConfig) -> tuple[list[Task], list[Task]]:
    tasks, eval_tasks = config.load_tasks()
    check_names(eval_tasks)
    return tasks, eval_tasks


def _train_all(runs: list[TrainConfig], jobs: int, console: Console) -> bool:
    """Return whether all were trained and evaluated: False after SIGINT, which every process gets."""
    _load_tasks(runs[0])
    threads = max(1, torch.get_num_threads() // jobs)
    context = multiprocessing.get_context("spawn")
    with progress(console) as shown, ProcessPoolExecutor(jobs, context) as pool:
        for run in {run.warm_start: run for run in runs}.values():
            _make_start(run, shown)
        steps = shown.add_task(f"steps of {len(runs)} runs", total=sum(run.steps for run in runs))
        finished = shown.add_task("runs", total=len(runs))
        waiting = {pool.submit(_train_one, run, threads) for run in runs}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=SECONDS_BETWEEN_LOOKS, return_when=FIRST_COMPLETED)
                for one in done:
                    if not one.result():
                        return False
                    shown.advance(finished)
                shown.update(steps, completed=sum(count_rows(run.out) for run in runs))
        except BrokenProcessPool as error:
            message = "the process of a run was killed; the same command goes on from the checkpoints"
            raise ChildProcessError(message) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return True


def _make_start(config: TrainConfig, shown: Progress) -> None:
    """Make the tiny model's warm start, with a bar, unless it is cached."""
    if config.model != "tiny":
        return
    total = config.warm_start.skill_steps + config.warm_start.habit_steps
    bar = shown.add_task("warm start", total=total)
    starting_policy(config, torch.device("cpu"), lambda step, loss: shown.update(bar, completed=step + 1))
    shown.remove_task(bar)


def _train_one(config: TrainConfig, threads: int) -> bool:
    """Train, evaluate and export, but for what is there already; return False after SIGINT."""
    torch.set_num_threads(threads)
    quiet = Console(quiet=True)
    try:
        tasks, eval_tasks = _load_tasks(config)
        with held(config.out):
            run = loop.train(config, tasks=tasks)
            if not _is_evaluated(config, eval_tasks):
                _evaluate(run.policy, eval_tasks, Settings.after(config), config.out, quiet)
            if not (config.out / MODEL).exists():
                _export(run.policy, config.out, quiet)
    except (loop.Interrupted, KeyboardInterrupt):
        return False
    return True


def _is_evaluated(config: TrainConfig, tasks: Sequence[Task]) -> bool:
    path = config.out / "eval.json"
    if not path.exists():
        return False
    found = Evaluation.load(path)
    return found.settings == Settings.after(config) and list(found.tasks) == [task.name for task in tasks]


def _evaluate(policy: Policy, tasks: Sequence[Task], settings: Settings, out: Path, console: Console) -> None:
    with progress(console) as shown:
        bar = shown.add_task("evaluate")
        evaluation = evaluate_policy(
            policy, tasks, settings, on_progress=lambda done, total: shown.update(bar, completed=done, total=total)
        )
    if not _is_first_process():
        return
    console.print(tables.format_evaluation(evaluation))  # first, so that it is not lost where it cannot be written
    evaluation.save(out / "eval.json")
    console.print(f"wrote {out / 'eval.json'}", soft_wrap=True)


def _export(policy: Policy, run: Path, console: Console) -> bool:
    """Write the model, by the first process; return False for the tiny one, of which there is nothing to write."""
    written = not _is_first_process() or save_pretrained(policy, run / MODEL)
    if written:
        console.print(f"wrote {run / MODEL}", soft_wrap=True)
    return written


def _console() -> Console:
    return Console(highlight=False, quiet=not _is_first_process())


def _is_first_process() -> bool:
    return rank_and_world()[0] == 0
