"""Tasks by name."""

from neuromas.tasks.base import SPLITS, Problem, Split, Task, floor, question_id, split_of
from neuromas.tasks.navigate import Navigate

TASKS: dict[str, type[Task]] = {"navigate": Navigate}


def get_task(name: str) -> Task:
    """Return the task of that name; ValueError lists the names there are."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    return TASKS[name]()


__all__ = ["SPLITS", "TASKS", "Navigate", "Problem", "Split", "Task", "floor", "get_task", "question_id", "split_of"]
