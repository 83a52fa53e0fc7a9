"""How far long work is: bars in a terminal, and where there is none (a log file, CI) a line now and then."""

import math
from collections.abc import Iterator
from typing import Any

from paec_kernels.extras import extra

with extra("train"):
    from rich.console import Console, RenderableType
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

SECONDS = 10.0  # between two lines of one task


def progress(console: Console) -> Progress:
    """Return bars or lines. A task's field ``figures`` is shown with it."""
    return Bars(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


class Bars(Progress):
    """A bar a task as wide as the terminal, and the tasks' figures below."""

    def __init__(self, console: Console) -> None:
        bar = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
        super().__init__(*bar, TimeElapsedColumn(), TimeRemainingColumn(), console=console)

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield from (Text(task.fields["figures"]) for task in self.tasks if "figures" in task.fields)


class Lines(Progress):
    """A line for a task's first news, for its end, and for news that come SECONDS after the line before.

    What has no end that could be told is named when it begins.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)
        self._next: dict[TaskID, float] = {}  # when the next line is due

    def add_task(self, description: str, *args: Any, **options: Any) -> TaskID:
        if options.get("total", 100) is None:
            self.console.print(description, soft_wrap=True, markup=False)
        return super().add_task(description, *args, **options)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        task, now = self._tasks[task_id], self.get_time()
        if now < self._next.get(task_id, 0.0) and not (task.finished and self._next[task_id] < math.inf):
            return
        self._next[task_id] = math.inf if task.finished else now + SECONDS
        elapsed = TimeElapsedColumn().render(task)
        line = f"{task.description} {MofNCompleteColumn().render(task)}, {elapsed}  {task.fields.get('figures', '')}"
        self.console.print(line.rstrip(), soft_wrap=True, markup=False)
