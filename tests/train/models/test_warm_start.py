from dataclasses import replace

import pytest
import torch

from paec_kernels.saved_state import UnreadableFileError
from paec_kernels.train.models.tiny import TinyPolicy
from paec_kernels.train.models.warm_start import WarmStart, warm_start
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
        options = WarmStart(Habits(careful), skill_steps=1, habit_steps=100, batch=32, learning_rate=2e-2)
        policy = TinyPolicy(warm_start(options, tmp_path))
        rollout = policy.sample(
            [p.prompt for p in problems], 5, max_new_tokens=1, temperature=1.0, seeds=range(len(problems))
        )
        texts = policy.texts(rollout)
        assert sum(text == route for text in texts) > 0.9 * len(texts)
