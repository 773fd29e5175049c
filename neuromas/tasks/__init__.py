"""Tasks by name."""

from collections.abc import Callable
from functools import partial

from neuromas.tasks.base import SPLITS, Problem, Split, Task, floor, question_id, split_of
from neuromas.tasks.boolean_expressions import BooleanExpressions
from neuromas.tasks.dyck_languages import DyckLanguages
from neuromas.tasks.multistep_arithmetic_two import MultistepArithmeticTwo
from neuromas.tasks.navigate import Navigate
from neuromas.tasks.tracking_shuffled_objects import TrackingShuffledObjects
from neuromas.tasks.web_of_lies import WebOfLies

TASKS: dict[str, Callable[[int | None], Task]] = {
    "boolean_expressions": BooleanExpressions,
    "dyck_languages": DyckLanguages,
    "multistep_arithmetic_two": MultistepArithmeticTwo,
    "navigate": Navigate,
    "tracking_shuffled_objects_three_objects": partial(TrackingShuffledObjects, 3),
    "tracking_shuffled_objects_five_objects": partial(TrackingShuffledObjects, 5),
    "tracking_shuffled_objects_seven_objects": partial(TrackingShuffledObjects, 7),
    "web_of_lies": WebOfLies,
}
"""What makes a task of each name, given its difficulty."""


def get_task(name: str, difficulty: int | None = None) -> Task:
    """Return the task of that name; ValueError lists the names there are, or says what its difficulty may be."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {sorted(TASKS)}, got {name!r}")
    return TASKS[name](difficulty)


__all__ = [
    "SPLITS",
    "TASKS",
    "BooleanExpressions",
    "DyckLanguages",
    "MultistepArithmeticTwo",
    "Navigate",
    "Problem",
    "Split",
    "Task",
    "TrackingShuffledObjects",
    "WebOfLies",
    "floor",
    "get_task",
    "question_id",
    "split_of",
]
