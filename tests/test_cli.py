import json
import subprocess
import sys

import pytest

pytest.importorskip("tyro", reason="needs the training's packages: pip install 'paec-kernels[train]'")
from paec_kernels.cli import main
from paec_kernels.train.algorithms import ALGORITHMS

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


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_help_lists_the_options_of_the_algorithm(algo, capsys):
    assert paec("train", "--algo", algo, "--help") == 0
    shown = capsys.readouterr().out
    assert ("--method.paec.lam" in shown) == algo.startswith("paec")
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
        ("train --tasks nonsense", "nonsense"),
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
