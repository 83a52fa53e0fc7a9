import errno
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train.made_runs import write_run

pytest.importorskip("tyro", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.cli import main
from paec_kernels.train import commands, loop
from paec_kernels.train.algorithms import ALGORITHMS
from paec_kernels.train.config import EvalConfig, EvalOptions, TrainConfig
from paec_kernels.train.models.warm_start import WarmStart
from paec_kernels.train.out_folder import LOCK
from paec_kernels.train.report.evaluate import Evaluation, check_names
from paec_kernels.train.tasks.by_name import load_tasks
from paec_kernels.train.tasks.families import FAMILIES

TINY = (
    "--warm-start.skill-steps 150 --warm-start.habit-steps 0 --warm-start.batch 32 --tasks parity count "
    "--steps 2 --prompts 4 --answers 4 --max-new-tokens 12 --evaluate.problems 5 --evaluate.samples 4"
).split()


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def paec(*args) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(arg) for arg in args])
    return ended.value.code


def torchrun(*args) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # Without "--" torchrun takes our --run for an abbreviation of its --run-path.
    command = [*launch, "-m", "paec_kernels.cli", "--", *map(str, args)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("macro-average") == 1


def test_train_then_eval_and_inspect(tmp_path, cache, capsys):
    run = tmp_path / "run"
    assert paec("train", "--out", run, "--cache", cache, *TINY, "--algo", "paec", "--method.paec.lam", "0.5") == 0
    config = json.loads((run / "config.json").read_text())
    assert config["method"]["paec"]["lam"] == 0.5
    assert config["chat"] is None
    first = json.loads((run / "eval.json").read_text())
    assert set(first["tasks"]) == {"parity", "count"}
    assert "macro-average" in capsys.readouterr().out
    assert paec("eval", "--run", run, "--out", tmp_path / "again", *TINY[-4:]) == 0
    assert json.loads((tmp_path / "again" / "eval.json").read_text()) == first
    seen = tmp_path / "seen"
    assert paec("inspect", "--run", run, "--out", seen, *"--problems 3 --answers 2 --paec.rho 0.5".split()) == 0
    report = json.loads((seen / "inspect.json").read_text())
    assert [group["task"] for group in report["groups"]] == ["parity", "count", "parity"]
    assert (report["training"]["max_new_tokens"], report["options"]["paec"]["rho"]) == (12, 0.5)
    assert "The same answers" in capsys.readouterr().out


def test_files_of_problems_are_read_once(tmp_path, cache, monkeypatch):
    pytest.importorskip("math_verify", reason="needs the training's packages: pip install 'paec-kernels[train]'")
    from paec_kernels.train.tasks import jsonl

    rows = [
        {"prompt": [{"content": f"a1{i}+2{i}:"}], "answer": 30 + 2 * i} for i in range(5)
    ]  # a chat is left as it is
    for name, part in (("a", rows[:3]), ("b", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    read = []
    monkeypatch.setattr(jsonl, "_read", lambda path, task, was=jsonl._read: read.append(task) or was(path, task))
    tasks = ["--tasks", tmp_path / "a.jsonl", "--eval-tasks", tmp_path / "b.jsonl"]
    assert paec("train", "--out", tmp_path / "run", "--cache", cache, *TINY, *tasks) == 0
    assert read == ["a", "b"]
    assert set(json.loads((tmp_path / "run" / "eval.json").read_text())["tasks"]) == {"b"}


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path, cache):
    run = tmp_path / "run"
    torchrun("train", "--out", run, "--cache", cache, *TINY)
    trained = (run / "eval.json").read_bytes()
    torchrun("eval", "--run", run, "--out", tmp_path / "two", *TINY[-4:])
    assert paec("eval", "--run", run, "--out", tmp_path / "one", *TINY[-4:]) == 0
    assert trained == (tmp_path / "two" / "eval.json").read_bytes() == (tmp_path / "one" / "eval.json").read_bytes()


def test_compare(tmp_path, cache, capsys):
    options = [f"--train.{option[2:]}" if option.startswith("--") else option for option in TINY]
    command = ["compare", "--out", tmp_path, "--seeds", 2, "--jobs", 2, "--train.cache", cache, *options]
    assert paec(*command, "--arms", "grpo", "paec") == 0
    assert {path.parent.name for path in tmp_path.glob("runs/*/*")} == {"grpo", "paec"}
    assert (tmp_path / "comparison.md").read_text().count("| paec") >= 2
    assert len(list(tmp_path.glob("*.png"))) == 4
    tables = (tmp_path / "comparison.csv").read_bytes()
    assert paec("compare", "--out", tmp_path / "again", "--runs", tmp_path / "runs") == 0
    assert (tmp_path / "again" / "comparison.csv").read_bytes() == tables


def test_compare_arms_with_options_from_several_starts(tmp_path, cache):
    options = [f"--train.{option[2:]}" if option.startswith("--") else option for option in TINY]
    command = [
        "compare",
        "--out",
        tmp_path,
        "--seeds",
        3,
        "--first-seed",
        7,
        "--warm-starts",
        2,
        "--train.cache",
        cache,
    ]
    arm = "paec,paec.lam=5,paec.penalty=relative,clip_low=0.1"
    assert paec(*command, *options, "--arms", "grpo", arm) == 0
    runs = {path.relative_to(tmp_path / "runs"): json.loads(path.read_text()) for path in tmp_path.rglob("config.json")}
    assert {str(path.parent) for path in runs} == {f"{name}/{seed}" for name in ("grpo", arm) for seed in (7, 8, 9)}
    for path, config in runs.items():
        assert config["seed"] == int(path.parts[1])
        assert config["warm_start"]["seed"] == config["seed"] % 2
        if path.parts[0] == arm:
            method = config["method"]
            assert (method["paec"]["lam"], method["paec"]["penalty"], method["clip_low"]) == (5, "relative", 0.1)
    assert f"| {arm} (3) |" in (tmp_path / "comparison.md").read_text()


def tasks_file(path, first: int) -> str:
    path.parent.mkdir(exist_ok=True)
    rows = [{"prompt": [{"content": f"a1{first + i}+2{i}:"}], "answer": 30 + 2 * i + first} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


COLLIDING = {
    "same stem": ("aime24/test.jsonl", "math500/test.jsonl"),
    "but for case": ("a/Test.jsonl", "b/test.jsonl"),
    "the averages' name": ("a/Macro.jsonl", "b/test.jsonl"),
    "one name twice": ("parity", "parity"),
    "one file twice": ("a/test.jsonl", "a/../a/test.jsonl"),
    "order of options": ("gym:chain_sum,max_terms=2,max_digits=1", "gym:chain_sum,max_digits=1,max_terms=2"),
    "value written otherwise": ("gym:chain_sum,max_terms=2", "gym:chain_sum,max_terms=+2"),
}


@pytest.mark.parametrize("command", ["train", "eval", "compare"])
@pytest.mark.parametrize("name", COLLIDING)
def test_tasks_whose_results_would_collide_are_refused_before_the_work(name, command, tmp_path, cache, capsys):
    names = []
    for number, task in enumerate(COLLIDING[name]):
        is_file = task.endswith(".jsonl")
        names.append(tasks_file(tmp_path / task, 0 if "/../" in task else number) if is_file else task)
    out = ["--out", tmp_path / "out"]
    if command == "eval":
        assert paec("eval", *out, "--tasks", *names) == 2
    else:
        prefix = "--train." if command == "compare" else "--"
        assert paec(command, *out, f"{prefix}cache", cache, f"{prefix}eval-tasks", *names) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "tasks must be at least one, with names that differ and are not 'macro', got [" in error
    assert not (tmp_path / "out").exists()


def test_tasks_that_differ_in_an_option_do_not_collide():
    tasks, _ = load_tasks(["gym:chain_sum,max_terms=2", "gym:chain_sum,max_terms=3", "gym:chain_sum"])
    check_names(tasks)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train --tasks parity count parity", "tasks must name each once, got parity more than once"),
        ("compare --arms grpo paec grpo", "arms must name each once, got grpo more than once"),
        ("compare --arms", "arms must name at least one, got none"),
        ("compare --arms nonsense,paec.lam=1", "arms must be one of grpo, "),
        (
            "compare --arms paec,lam=1",
            "arms must name fields among clip_low, clip_high, paec, got 'lam' in 'paec,lam=1'",
        ),
        ("compare --arms paec,paec.lam", "arms must be NAME or NAME,FIELD=VALUE,..., got 'paec,paec.lam'"),
        ("compare --arms paec,paec.lam=-1", "PAECConfig.lam must be >= 0 and finite, got -1"),
        ("compare --arms paec,clip_low=high", "clip_low must be a number, got 'high'"),
    ],
)
def test_what_is_named_twice_is_refused(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paec(*args.split()) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "eval", "compare", "inspect"])
def test_a_folder_that_cannot_be_written_is_named_before_the_work(command, tmp_path, cache, capsys):
    file = tmp_path / "file"
    file.write_text("as it was")
    for out in (file, file / "below", "/proc/nowhere"):
        assert paec(command, "--out", out) == 2
        error = capsys.readouterr().err
        assert f"paec: out must be a folder to write to, got {out}: " in error
        assert len(error.splitlines()) == 1
    assert file.read_text() == "as it was"


@pytest.mark.parametrize("command", ["train", "eval", "compare", "inspect"])
def test_a_folder_in_use_is_refused_by_its_holder(command, tmp_path, capsys):
    with (tmp_path / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("process 1 on another machine")
        other.flush()
        assert paec(command, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path} is held by process 1 on another machine" in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_without_a_terminal_lines_tell_and_a_result_without_room_is_printed(tmp_path, cache, capsys, monkeypatch):
    def full(evaluation, path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Evaluation, "save", full)
    assert paec("train", "--out", tmp_path / "run", "--cache", cache, *TINY) == 2
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert any(line.startswith("train 1/2, 0:00:") and "reward 0." in line for line in lines)
    assert any(line.startswith("train 2/2, 0:00:") for line in lines)
    assert f"saved step 2 in {tmp_path}/run/checkpoint.pt" in lines
    assert any(line.startswith("macro-average") for line in lines)
    assert error == f"paec: [Errno 28] No space left on device: '{tmp_path}/run/eval.json'\n"


def test_damaged_files_of_a_run_are_named(tmp_path, cache, capsys):
    run = tmp_path / "run"
    assert paec("train", "--out", run, "--cache", cache, *TINY) == 0
    for name, readers in (("checkpoint.pt", "train eval inspect"), ("config.json", "eval inspect compare")):
        path = run / name
        whole = path.read_bytes()
        for content in (b"", whole[: len(whole) // 2], bytes(range(256))):
            path.write_bytes(content)
            for command in readers.split():
                args = {
                    "train": ("--out", run, "--cache", cache, *TINY),
                    "compare": ("--runs", run, "--out", tmp_path / "compare"),
                }.get(command, ("--run", run, "--out", tmp_path / command))
                capsys.readouterr()
                assert paec(command, *args) == 2
                error = capsys.readouterr().err
                assert f"paec: {path} must be a" in error
                assert len(error.splitlines()) == 1
        path.write_bytes(whole)
    log = run / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-5])
    assert paec("train", "--out", run, "--cache", cache, *TINY) == 2
    assert (
        f"{log} must be the log of the 2 steps that are in checkpoint.pt, but it ends after 1"
        in capsys.readouterr().err
    )
    assert {path.name for path in run.iterdir()} == {
        "checkpoint.pt", "config.json", "eval.json", "log.jsonl", "tensorboard"
    }  # fmt: skip


def die(config, threads):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_comparison_names_what_stopped_one_of_its_runs(tmp_path, cache, capsys, monkeypatch):
    options = [f"--train.{option[2:]}" if option.startswith("--") else option for option in TINY]
    command = ["compare", "--out", tmp_path, "--seeds", 1, "--arms", "grpo", "--train.cache", cache, *options]
    checkpoint = tmp_path / "runs" / "grpo" / "0" / "checkpoint.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"")
    assert paec(*command) == 2
    assert f"paec: {checkpoint} must be a checkpoint of paec train, but it is empty" in capsys.readouterr().err
    monkeypatch.setattr(commands, "_train_one", die)
    assert paec(*command) == 2
    assert "the process of a run was killed; the same command goes on" in capsys.readouterr().err


def test_a_gradient_that_is_not_finite_is_one_line(tmp_path, cache, capsys, monkeypatch):
    monkeypatch.setattr(loop.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(float("inf")))
    assert paec("train", "--out", tmp_path, "--cache", cache, *TINY) == 2
    error = capsys.readouterr().err
    assert error.startswith("paec: the gradient's norm is inf in step 1")
    assert len(error.splitlines()) == 1


def test_infinite_options_are_compared(tmp_path, capsys):
    runs = [tmp_path / name for name in "ab"]
    for seed, (run, high) in enumerate(zip(runs, (math.inf, 3.0), strict=True)):
        write_run(run, "cispo", seed, method={"clip_high": high})  # as earlier versions wrote it: Infinity
    assert paec("compare", "--out", tmp_path / "out", "--runs", *runs) == 0

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    document = json.loads((tmp_path / "out" / "comparison.json").read_text(), parse_constant=refuse)
    assert document["differing"] == {"method.clip_high": ["inf", 3.0]}
    assert "`method.clip_high` (inf, 3.0)" in (tmp_path / "out" / "comparison.md").read_text()


def test_a_comparison_evaluates_again_what_was_evaluated_otherwise(tmp_path, cache):
    config = TrainConfig(
        out=tmp_path,
        cache=Path(cache),
        warm_start=WarmStart(skill_steps=150, habit_steps=0, batch=32),
        tasks=("parity",),
        **{"steps": 1, "prompts": 2, "answers": 2, "max_new_tokens": 4, "evaluate": EvalOptions(5, 4)},
    )
    for changed in ({}, {"evaluate": EvalOptions(5, 2)}, {"eval_tasks": ("count",)}, {"steps": 2}):
        config = replace(config, **changed)
        assert commands._train_one(config, 1)
        time = (tmp_path / "eval.json").stat().st_mtime_ns
        found = Evaluation.load(tmp_path / "eval.json")
        assert found.settings.samples == config.evaluate.samples
        assert list(found.tasks) == list(config.eval_tasks or config.tasks)
        assert commands._train_one(config, 1)  # nothing has changed
        assert (tmp_path / "eval.json").stat().st_mtime_ns == time
    assert list(Evaluation.load(tmp_path / "eval-1.json").tasks) == ["count"]
    assert not (tmp_path / "model").exists()


def test_an_evaluation_without_a_run_starts_from_its_tasks(tmp_path, monkeypatch):
    def started(config, *rest):
        raise ValueError(config.warm_start.for_tasks(config.tasks).families)

    monkeypatch.setattr(commands, "starting_policy", started)
    monkeypatch.setattr(commands, "_make_start", lambda *_: None)
    for tasks, families in (((), tuple(FAMILIES)), (("chain", "parity"), ("chain", "parity"))):
        with pytest.raises(ValueError, match=re.escape(str(families))):
            commands.evaluate(EvalConfig(tasks=tasks, out=tmp_path))


def test_the_tiny_model_is_not_exported(tmp_path, cache, capsys):
    assert paec("train", "--out", tmp_path, "--cache", cache, *TINY) == 0
    assert not (tmp_path / "model").exists()
    assert paec("export", "--run", tmp_path) == 2
    assert "run must be of a Hugging Face model" in capsys.readouterr().err
    assert paec("export", "--run", tmp_path / "nowhere") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_help_lists_the_options_of_the_algorithm(algo, capsys):
    assert paec("train", "--algo", algo, "--help") == 0
    shown = capsys.readouterr().out
    assert ("--method.paec.lam" in shown) == (algo == "oracle" or algo.startswith("paec"))
    assert ("--method.aer." in shown) == (algo == "aer")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("train --steps 0", "steps must be >= 1, got 0"),
        ("train --seed -1", "seed must be >= 0, got -1"),
        ("train --learning-rate nan", "learning_rate must be > 0 and finite, got nan"),
        ("train --evaluate.samples 0", "samples must be >= 1, got 0"),
        ("train --evaluate.seed -1", "seed must be >= 0, got -1"),
        ("train --warm-start.skill-steps 0", "skill_steps must be >= 1, got 0"),
        ("train --warm-start.batch 0", "batch must be >= 1, got 0"),
        ("eval --max-new-tokens 0", "max_new_tokens must be >= 1, got 0"),
        ("eval --temperature 0", "temperature must be > 0 and finite, got 0"),
        ("train --warm-start.width 6", "width must be a multiple of 4, got 6"),
        ("train --tasks nonsense", "nonsense"),
        ("train --algo oracle", "tasks must be among chain, chain+, scan, scan+, carry, carry+ for 'oracle'"),
        ("train --algo oracle --tasks chain parity", "got parity"),
        ("train --algo oracle --tasks chain --model smollm2", "model must be tiny for 'oracle'"),
        ("compare --arms grpo oracle", "tasks must be among chain, chain+, scan, scan+, carry, carry+ for 'oracle'"),
        ("train --algo nonsense", "nonsense"),
        ("train --preset nonsense", "nonsense"),
        ("train --chat True", "chat must not be True for the tiny model"),
        ("eval --chat True", "chat must not be True for the tiny model"),
        ("eval --run nowhere --chat True", "chat must be None for a run"),
        ("compare --seeds 0", "seeds must be >= 1, got 0"),
        ("eval --run nowhere", "nowhere"),
        ("compare --runs nowhere", "nowhere"),
        ("inspect --problems 0", "problems must be >= 1, got 0"),
        ("inspect --answers 0", "answers must be"),
        ("inspect --temperature 0", "temperature must be > 0"),
        ("inspect --learning-rate nan", "learning_rate must be > 0"),
        ("inspect --chat True", "chat must not be True for the tiny model"),
        ("inspect --prompts a --tasks parity", "prompts must be none where tasks are named"),
        ("inspect --tasks nonsense", "nonsense"),
        ("inspect --paec.rho 2", "rho must be"),
        ("inspect --run nowhere", "nowhere"),
    ],
)
def test_bad_values_are_named(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paec(*args.split()) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", "").split())  # tyro's messages come in a box
    assert not list(tmp_path.iterdir())


def test_the_module_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "paec_kernels.cli", "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("train", "eval", "compare", "inspect"))
