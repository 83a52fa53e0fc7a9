from dataclasses import replace

import pytest
import torch

from paec_kernels.saved_state import ADDED, UnreadableFileError
from paec_kernels.train.config import TrainConfig, plain
from paec_kernels.train.models.tiny import TinyModel, TinyPolicy
from paec_kernels.train.models.warm_start import WarmStart, batch_loss, warm_start
from paec_kernels.train.policies import starting_policy
from paec_kernels.train.tasks.by_name import OF_LETTERS
from paec_kernels.train.tasks.families import FAMILIES, Habits

OPTIONS = WarmStart(skill_steps=20, habit_steps=5, batch=16)


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_made_once_and_read_after_that(tmp_path):
    steps = []
    made = warm_start(OPTIONS, tmp_path, lambda step, loss: steps.append((step, loss)))
    assert [step for step, _ in steps] == list(range(25))
    assert steps[-1][1] < 0.9 * steps[0][1]
    read = warm_start(OPTIONS, tmp_path, lambda step, loss: pytest.fail("made again"))
    assert same(made, read)
    assert all(parameter.grad is None for parameter in made.parameters())  # none for the training to add to
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_the_same_wherever_it_is_made(tmp_path):
    assert same(warm_start(OPTIONS, tmp_path / "a"), warm_start(OPTIONS, tmp_path / "b"))


def test_other_options_are_another_file(tmp_path):
    model = warm_start(OPTIONS, tmp_path)
    assert not same(model, warm_start(replace(OPTIONS, seed=1), tmp_path))
    assert not same(model, warm_start(replace(OPTIONS, habits=Habits(careful=0.9)), tmp_path))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_training_names_the_families():
    short = tuple(FAMILIES)  # in this order, on which the weights depend
    assert short == ("add", "sub", "parity", "sort", "count") == TrainConfig().tasks
    for tasks, families in (
        ((), short),
        (("gym:aiw", "parity"), short),
        (("chain",), ("chain",)),
        (("parity", "carry+", "gym:aiw"), ("parity", "carry+")),
    ):
        assert WarmStart().for_tasks(tasks) == WarmStart(families=families)
        assert WarmStart(families=("sort",)).for_tasks(tasks).families == ("sort",)


def test_fields_that_came_later_have_their_defaults():
    start = plain(WarmStart().for_tasks(()))
    later = {name: start[name] for name in ("families", "width", "layers")}
    later["step_slip"] = start["habits"]["step_slip"]
    assert later == {name: ADDED[name] for name in later}


def test_the_start_is_that_of_the_tasks(tmp_path):
    config = TrainConfig(tasks=("scan",), warm_start=OPTIONS, cache=tmp_path)
    policy = starting_policy(config, torch.device("cpu"))
    assert same(policy.module, warm_start(replace(OPTIONS, families=("scan",)), tmp_path))
    assert not same(policy.module, warm_start(OPTIONS, tmp_path))
    assert same(warm_start(OPTIONS, tmp_path), warm_start(replace(OPTIONS, families=tuple(FAMILIES)), tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_sizes(tmp_path):
    model = warm_start(replace(OPTIONS, width=32, layers=1, skill_steps=2, habit_steps=0), tmp_path)
    assert model.embedding.weight.shape[1] == 32
    assert len(model.blocks) == 1
    with pytest.raises(ValueError, match="width must be a multiple of 4, got 30"):
        WarmStart(width=30)
    with pytest.raises(ValueError, match=r"families must be .*'nonsense'"):
        WarmStart(families=("nonsense",))


def test_each_step_is_of_its_phase():
    """The skill's are as those of a habit of as many careful ones; the habit's follow the habits."""
    torch.manual_seed(0)
    model = TinyModel(width=32, n_layers=1)
    families = list(FAMILIES.values())

    def loss(step: int, careful: float, skill_steps: int) -> float:
        options = WarmStart(habits=Habits(careful), skill_steps=skill_steps, batch=16)
        return batch_loss(model, families, options, step).item()

    assert loss(4, 0.001, skill_steps=5) == loss(4, 0.5, skill_steps=4)
    assert loss(5, 0.001, skill_steps=5) == loss(5, 0.001, skill_steps=1) != loss(5, 0.5, skill_steps=1)


def test_another_way_to_write_solutions_is_another_file(tmp_path, monkeypatch):
    options = replace(OPTIONS, families=("chain",), skill_steps=2, habit_steps=1)
    model = warm_start(options, tmp_path)
    monkeypatch.setitem(OF_LETTERS, "chain", replace(OF_LETTERS["chain"], rare=0.3))
    assert not same(model, warm_start(options, tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"PK\3\4", bytes(range(256))])
def test_a_damaged_file_is_named(tmp_path, content):
    warm_start(OPTIONS, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    with pytest.raises(UnreadableFileError, match=f"^{path} must be the tiny model's start, but it is .* Move it away"):
        warm_start(OPTIONS, tmp_path)


def test_a_folder_that_cannot_be_made_is_named_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        warm_start(OPTIONS, tmp_path / "file" / "below", lambda step, loss: pytest.fail("made"))


def test_the_habit_is_learned_last(tmp_path):
    """After only habit steps of one route, that route is what the model takes."""
    problems = FAMILIES["count"].eval_problems(20)
    for careful, route in ((0.0, "q"), (1.0, "c")):
        options = WarmStart(habits=Habits(careful), skill_steps=1, habit_steps=100, batch=32, learning_rate=2e-2)
        policy = TinyPolicy(warm_start(options, tmp_path))
        rollout = policy.sample(
            [p.prompt for p in problems], 5, max_new_tokens=1, temperature=1.0, seeds=range(len(problems))
        )
        texts = policy.texts(rollout)
        assert sum(text == route for text in texts) > 0.9 * len(texts)
