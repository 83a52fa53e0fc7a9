"""Evaluation of a policy that answers by rote: who is asked what, and what is kept of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from helpers import on_ranks
from rich.console import Console
from train.rote import SETTINGS, Counting, Rote

from paec_kernels.train.report.evaluate import Evaluation, evaluate, mean_scores, pass_ks, summarise
from paec_kernels.train.report.tables import format_evaluation


def run(policy: Rote, *tasks: Counting, batch_size: int = 256, **changed) -> Evaluation:
    return evaluate(policy, tasks, replace(SETTINGS, **changed), batch_size=batch_size)


def test_every_answer_is_kept() -> None:
    policy = Rote()
    found = run(policy, Counting("a", 10, 2), Counting("b", 500, 9))
    assert found.settings == SETTINGS
    assert {name: len(results) for name, results in found.tasks.items()} == {"a": 2, "b": 3}
    for result in (result for results in found.tasks.values() for result in results):
        number, seed = int(result.prompt), policy.seeds[result.prompt, 0.7]
        said = [None if (i + seed) % 3 == 2 else str(number + (i + seed) % 3) for i in range(6)]
        assert result.answer == result.greedy_answer == result.prompt
        assert result.greedy_correct is True
        assert result.greedy_length == len(result.prompt)
        assert result.answers == said
        assert result.correct == [answer == result.prompt for answer in said]
        assert result.lengths == [len(answer or "hm") for answer in said]


def test_the_summary_is_that_of_the_answers() -> None:
    # Each problem: 2 of 6 right, 2 plus one, 2 without an answer; so the vote is a tie.
    found = run(Rote(), Counting("a", 10, 2), Counting("b", 500, 9))
    summary = summarise(found)
    assert list(summary) == ["a", "b", "macro"]
    assert mean_scores(found) == {
        task: {name: estimate.mean for name, estimate in scores.items()} for task, scores in summary.items()
    }
    means = {name: estimate.mean for name, estimate in summary["macro"].items()}
    assert means == pytest.approx(
        {
            "greedy": 1.0,
            "mean@6": 1 / 3,
            "maj@6": 1 / 2,
            "pass@1": 1 / 3,
            "pass@2": 1 - 6 / 15,
            "pass@4": 1 - 1 / 15,
            "pass@6": 1.0,
            "distinct": 2.0,
            "length": (2 + 8 / 3) / 2,  # 2 in task a; 3, 3 and 2 in b
        }
    )


def test_problems_are_asked_in_batches() -> None:
    policy, progress = Rote(), []
    evaluate(policy, [Counting("a", 10, 9)], SETTINGS, batch_size=12, on_progress=lambda *at: progress.append(at))
    assert policy.calls == [(2, 1, 0.0), (2, 6, 0.7), (1, 1, 0.0), (1, 6, 0.7)]
    assert progress == [(14, 21), (21, 21)]


def test_a_problem_is_answered_the_same_whatever_else_is_asked() -> None:
    alone = run(Rote(), Counting("b", 500, 9), problems=2)
    among = run(Rote(), Counting("a", 10, 2), Counting("b", 500, 9), batch_size=1)
    assert among.tasks["b"][:2] == alone.tasks["b"]


class Halves(Counting):
    """Answers are equal if their halves are; one alone is right."""

    def same(self, one: str, other: str) -> bool:
        return int(one) // 2 == int(other) // 2


def test_answers_that_the_verifier_holds_equal_are_one_vote() -> None:
    together = run(Rote(), Halves("a", 10, 1))  # of six, two say 10 and two 11
    (result,) = together.tasks["a"]
    assert Counter(result.answers) in (Counter({"10": 4, None: 2}), Counter({"11": 4, None: 2}))
    assert result.greedy_answer in result.answers
    assert sum(result.correct) == 2
    assert mean_scores(together)["a"]["distinct"] == 1
    apart = run(Rote(), Halves("a", 11, 1))  # 11 and 12
    assert Counter(apart.tasks["a"][0].answers) == Counter({"11": 2, "12": 2, None: 2})


SHARED = [Counting("a", 10, 3), Counting("b", 500, 2)]


def evaluate_on_rank(rank: int, folder: Path) -> int:
    """Write the evaluation as this rank has it, and count the problems that it sampled."""
    dist.init_process_group("gloo")
    policy = Rote()
    run(policy, *SHARED, problems=9, batch_size=12).save(folder / f"{rank}.json")
    return sum(problems for problems, answers, _ in policy.calls if answers > 1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])  # more ranks than batches: one has nothing to do
def test_ranks_share_the_problems_and_all_have_the_whole(tmp_path: Path, world: int) -> None:
    asked = on_ranks(world, evaluate_on_rank, tmp_path, tmp_path)
    alone = run(Rote(), *SHARED, problems=9, batch_size=12)
    assert sum(asked) == sum(map(len, alone.tasks.values()))
    assert max(asked) <= 4
    for rank in range(world):
        assert Evaluation.load(tmp_path / f"{rank}.json") == alone


def test_seeds_differ_by_seed_task_and_place() -> None:
    seeds = set()
    for seed in (0, 1):
        for name in ("a", "b"):
            policy = Rote()
            run(policy, Counting(name, 10, 3), seed=seed)
            seeds |= {value for (_, temperature), value in policy.seeds.items() if temperature > 0}
    assert len(seeds) == 12


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    found = run(Rote(), Counting("a", 10, 2))
    found.save(tmp_path / "eval.json")
    assert Evaluation.load(tmp_path / "eval.json") == found
    saved = json.loads((tmp_path / "eval.json").read_text())
    assert saved["summary"]["macro"]["maj@6"] == [0.5, 0.5, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["eval.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "\0", "{}", "[]", '{"settings": {}, "tasks": []}', '{"settings": {}, "tasks": {"a": [{"prompt": "1"}]}}']
    + [pytest.param("[" * 100_000, id="deep")],
)
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "eval.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"path must be a file that Evaluation.save wrote, got .*eval\.json"):
        Evaluation.load(path)


def test_the_table_shows_each_task_and_the_average() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(format_evaluation(run(Rote(), Counting("a", 10, 2), Counting("b", 500, 9))))
    lines = capture.get().splitlines()
    (row,) = [line for line in lines if line.split()[:1] == ["a"]]
    assert row.split() == ["a", "2", "100.0", "33.3", "50.0", "100.0", "2.00", "2"]
    intervals = lines[lines.index(row) + 1]
    assert intervals.split() == ["100-100", "33-33", "50-50", "100-100", "2.00-2.00", "2-2"]
    (row,) = [line for line in lines if line.split()[:1] == ["macro-average"]]
    assert row.split() == ["macro-average", "5", "100.0", "33.3", "50.0", "100.0", "2.00", "2"]


@pytest.mark.parametrize("width", [80, 60, 30])
def test_the_table_fits_whatever_its_names_and_numbers(width: int) -> None:
    names = ["gym:basic_arithmetic,max_terms=2,max_digits=1", "gym:chain_sum[1]", "b"]
    found = run(Rote(), *(Counting(name, 10**place, 9) for place, name in enumerate(names)))
    long = {
        task: [replace(r, lengths=[1024 * (i + 1)] * 6) for i, r in enumerate(rs)] for task, rs in found.tasks.items()
    }
    console = Console(width=width)
    with console.capture() as capture:
        console.print(format_evaluation(replace(found, tasks=long)))
    printed = capture.get()
    assert all(len(line) <= width for line in printed.splitlines())
    assert "…" not in printed
    for name in (*names, "macro-average"):
        assert name[:15] in printed
        folded = [name[start : start + 15] for start in range(0, len(name), 15)]
        assert width != 60 or all(part in printed for part in folded)
    for number in ("2048", "1024-3072", "2.00-2.00", "33.3", "pass@6", "distinct"):
        assert number in printed.split()


def test_pass_ks() -> None:
    assert [pass_ks(samples) for samples in (1, 4, 6)] == [[1], [1, 2, 4], [1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("name", "value"),
    [("problems", 0), ("samples", 0), ("max_new_tokens", 0), ("batch_size", 0), ("temperature", 0.0), ("seed", -1)],
)
def test_bad_numbers_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        run(Rote(), Counting("a", 10, 2), **{name: value})


@pytest.mark.parametrize("names", [(), ("a", "a"), ("macro",), ("a", "A"), ("Macro",), ("g,a=1,b=2", "g,b=2,a=1")])
def test_tasks_need_names_of_their_own(names: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="tasks must be at least one, with names that differ"):
        run(Rote(), *(Counting(name, 10, 2) for name in names))
