"""Tasks by name: a family of the tiny model, ``gym:NAME`` for a reasoning-gym dataset, or a .jsonl file.

Fields of a dataset's configuration may follow its name, as in ``gym:chain_sum,max_terms=2,max_digits=1``; a value is a
Python number, True, False or text.
"""

import ast
from collections.abc import Sequence
from typing import Any

from paec_kernels.train.tasks import jsonl
from paec_kernels.train.tasks.families import FAMILIES, Family
from paec_kernels.train.tasks.long_families import LONG_FAMILIES, LongFamily
from paec_kernels.train.tasks.task import Task

OF_LETTERS: dict[str, Family | LongFamily] = {**FAMILIES, **LONG_FAMILIES}  # for the tiny model, which learns them


def load_tasks(train: Sequence[str], evaluation: Sequence[str] | None = None) -> tuple[list[Task], list[Task]]:
    """Return the tasks of a training run and of its evaluation.

    Args:
        evaluation: None is the same names. A file that is named on both sides is divided between them.
    Raises:
        ValueError: a name of no task, or a .jsonl file that is not as it must be.
    """
    evaluation = train if evaluation is None else evaluation
    trained, evaluated = ([name for name in names if name.endswith(".jsonl")] for names in (train, evaluation))
    names = dict.fromkeys((*train, *evaluation))
    tasks: dict[str, Task] = {name: _generated(name) for name in names if not name.endswith(".jsonl")}
    if trained or evaluated:
        to_train, to_evaluate = jsonl.load(trained, evaluated)
        tasks |= zip((*trained, *evaluated), (*to_train, *to_evaluate), strict=True)
    return [tasks[name] for name in train], [tasks[name] for name in evaluation]


def _generated(name: str) -> Task:
    if name in OF_LETTERS:
        return OF_LETTERS[name]
    if name.startswith("gym:"):
        # Imported where it is needed: reasoning-gym takes seconds.
        from paec_kernels.train.tasks.gym import GymTask

        dataset, *fields = name.removeprefix("gym:").split(",")
        pairs = [field.partition("=") for field in fields]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"tasks of reasoning-gym must be gym:NAME,FIELD=VALUE,..., got {name!r}")
        return GymTask(dataset, **{field: value_of(text) for field, _, text in pairs})
    raise ValueError(f"tasks must be among {', '.join(OF_LETTERS)}, gym:NAME or a .jsonl file, got {name!r}")


def value_of(text: str) -> Any:
    """Return a Python number, True, False, None or another literal, or the text itself where it is none."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
